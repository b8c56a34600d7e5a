#!/usr/bin/env bash
# ADE20K, the Scene Parsing challenge's release with 150 classes.
#
#   bash data/download_ade.sh [--dry-run] [DIR]      DIR: the later --data_root; default: this folder
#
# Creates DIR/ADEChallengeData2016/{images,annotations}/{training,validation}. The archive stays in DIR/downloads and
# may be deleted afterwards. Existing files are not changed; an interrupted download can be resumed.
# --dry-run prints the actions only. About 2 GB are needed.
#
# Environment variable for a mirror:
#   ADE_URL   folder of ADEChallengeData2016.zip (ADE_MD5 for another archive of that name)
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=download_functions.sh
. "$(dirname "$0")/download_functions.sh"

ADE_URL=${ADE_URL:-https://data.csail.mit.edu/places/ADEchallenge}
ADE_MD5=${ADE_MD5:-7328b3957e407ddae1d3cbf487f149ef}

parse_arguments "$@"
ADE="$DIR/ADEChallengeData2016"

if [ -d "$ADE/images/training" ] && [ -d "$ADE/annotations/training" ]; then
    say "have     $ADE"
else
    fetch "$ADE_URL/ADEChallengeData2016.zip" "$ARCHIVES/ADEChallengeData2016.zip" - "$ADE_MD5"
    unpack "$ARCHIVES/ADEChallengeData2016.zip" ADEChallengeData2016 "$ADE"
fi
if ! $DRY_RUN; then
    images=$(count_files "$ADE/images/training" '*.jpg')
    [ "$images" = 20210 ] || say "warning: $images training images; the release has 20210"
    say "done     check with: python run.py --check_data --dataset ade --data_root $DIR"
fi
