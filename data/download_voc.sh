#!/usr/bin/env bash
# Pascal VOC 2012 with the augmented training masks and SSUL's saliency maps.
#
#   bash data/download_voc.sh [--dry-run] [DIR]      DIR: the later --data_root; default: this folder
#
# Creates DIR/VOCdevkit/VOC2012/{JPEGImages,SegmentationClassAug,saliency_map,ImageSets,splits,...}. Archives stay in
# DIR/downloads and may be deleted afterwards. Existing files are not changed; an interrupted download can be resumed.
# --dry-run prints the actions only. About 4.5 GB are needed.
#
# Environment variables for mirrors:
#   VOC_URL   folder of VOCtrainval_11-May-2012.tar (VOC_SIZE and VOC_MD5 for another archive of that name)
#   SSUL_URL  folder of SegmentationClassAug.zip and saliency_map.zip (the release of github.com/clovaai/SSUL)
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=download_functions.sh
. "$(dirname "$0")/download_functions.sh"

VOC_URL=${VOC_URL:-https://thor.robots.ox.ac.uk/pascal/VOC/voc2012}
VOC_SIZE=${VOC_SIZE:-1999639040}
VOC_MD5=${VOC_MD5:-6cd6e144f989b92b3379bac3b3de84fd}
SSUL_URL=${SSUL_URL:-https://github.com/clovaai/SSUL/releases/download/preparation}

parse_arguments "$@"
VOC="$DIR/VOCdevkit/VOC2012"

# write_list FILE IMAGES PUBLISHED: names on standard input -> "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
write_list() {
    local file=$1 published=$2 lines
    sed 's|.*|/JPEGImages/&.jpg /SegmentationClassAug/&.png|' >"$file.part"
    lines=$(wc -l <"$file.part" | tr -d ' ')
    mv "$file.part" "$file"
    say "list     $file ($lines images)"
    [ "$lines" = "$published" ] || say "warning: the published list has $published images"
}

mask_names() { find "$VOC/SegmentationClassAug" -name '*.png' | sed 's|.*/||; s|\.png$||' | LC_ALL=C sort; }

derive_lists() {
    local names="$VOC/ImageSets/Segmentation/val.txt"
    if $DRY_RUN; then
        [ -e "$VOC/splits/val.txt" ] || say "derive   $VOC/splits/val.txt"
        [ -e "$VOC/splits/train_aug.txt" ] || say "derive   $VOC/splits/train_aug.txt"
        return
    fi
    mkdir -p "$VOC/splits"
    if [ ! -e "$VOC/splits/val.txt" ]; then
        [ -e "$names" ] || die "$names is missing, so the lists cannot be derived; unpack VOC's ImageSets"
        write_list "$VOC/splits/val.txt" 1449 <"$names"
    fi
    if [ ! -e "$VOC/splits/train_aug.txt" ]; then
        # The augmented training set has all masks that are not in the validation set.
        sed 's|.*/\(.*\)\.png$|\1|' "$VOC/splits/val.txt" | LC_ALL=C sort | LC_ALL=C comm -13 - <(mask_names) |
            write_list "$VOC/splits/train_aug.txt" 10582
    fi
}

if [ -d "$VOC/JPEGImages" ]; then
    say "have     $VOC/JPEGImages"
else
    fetch "$VOC_URL/VOCtrainval_11-May-2012.tar" "$ARCHIVES/VOCtrainval_11-May-2012.tar" "$VOC_SIZE" "$VOC_MD5"
    unpack "$ARCHIVES/VOCtrainval_11-May-2012.tar" VOCdevkit/VOC2012 "$VOC"
fi
for name in SegmentationClassAug saliency_map; do
    if [ -d "$VOC/$name" ]; then
        say "have     $VOC/$name"
    else
        # No checksum is published: only the size stated by the host and the archive's CRC are checked.
        fetch "$SSUL_URL/$name.zip" "$ARCHIVES/$name.zip" - -
        unpack "$ARCHIVES/$name.zip" . "$VOC"
        $DRY_RUN || [ -d "$VOC/$name" ] || die "$ARCHIVES/$name.zip has no folder $name; is it the right archive?"
    fi
done
derive_lists
$DRY_RUN || say "done     check with: python run.py --check_data --dataset voc --data_root $DIR"
