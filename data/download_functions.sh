# Functions shared by download_voc.sh and download_ade.sh; sourced, not run.
# They never delete or overwrite a user's file; new folders are moved into place when complete.

DRY_RUN=false

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# parse_arguments "$@": sets DIR (default: the folder of the scripts) and DRY_RUN.
parse_arguments() {
    DIR=""
    local argument
    for argument in "$@"; do
        case "$argument" in
            --dry-run) DRY_RUN=true ;;
            -h | --help)
                sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
                exit 0
                ;;
            -*) die "unknown option $argument; see --help" ;;
            *)
                [ -z "$DIR" ] || die "one folder only: $DIR or $argument"
                DIR="$argument"
                ;;
        esac
    done
    DIR="${DIR:-$(cd "$(dirname "$0")" && pwd)}"
    # Expand ~ where the shell did not: in quotes, or from a file.
    case "$DIR" in
        "~" | "~/"*) DIR="$HOME${DIR#\~}" ;;
        "~"*) die "$DIR: write the full path" ;;
    esac
    local command
    for command in curl unzip tar awk; do
        command -v "$command" >/dev/null || die "$command is missing; install it"
    done
    ARCHIVES="$DIR/downloads"
    $DRY_RUN || mkdir -p "$ARCHIVES"
}

size_of() { wc -c <"$1" | tr -d ' '; }

md5_of() {
    if command -v md5sum >/dev/null; then md5sum "$1" | cut -d' ' -f1; else md5 -q "$1"; fi
}

human() { awk -v n="$1" 'BEGIN { if (n < 1e6) printf "%d bytes", n; else printf "%.2f GB", n / 1e9 }'; }

# need_space BYTES: stop unless the disk of DIR has that much free space.
need_space() {
    local free
    free=$(df -Pk "$DIR" | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')
    awk -v free="$free" -v need="$1" 'BEGIN { exit !(free >= need) }' ||
        die "$DIR: $(human "$free") free, $(human "$1") needed; free some space or give another folder"
}

# curl_safely ARGUMENTS... URL: https only, unless the given address itself is http (a local mirror).
curl_safely() {
    local protocols='=https'
    case "${*: -1}" in http://*) protocols='=http,https' ;; esac
    curl --fail --location --show-error --proto "$protocols" --proto-redir "$protocols" --retry 3 "$@"
}

remote_size() {
    curl_safely --silent --head "$1" | tr -d '\r' |
        awk 'tolower($1) == "content-length:" { n = $2 } END { print n }'
}

# check FILE SIZE MD5: print the fault of a file, or nothing. "-" means unknown.
check() {
    local found
    found=$(size_of "$1")
    if [ "$2" != - ] && [ "$found" != "$2" ]; then
        say "has $found bytes instead of $2"
    elif [ "$3" != - ]; then
        found=$(md5_of "$1")
        [ "$found" = "$3" ] || say "has the md5 $found instead of $3"
    fi
}

# fetch URL FILE SIZE MD5: download to FILE unless it exists; resumes FILE.part.
fetch() {
    local url=$1 file=$2 size=$3 md5=$4 part="$2.part" fault had=0
    if [ -e "$file" ]; then
        fault=$(check "$file" "$size" "$md5")
        [ -z "$fault" ] || die "$file $fault; move it away and run again"
        say "have     $file"
        return
    fi
    if $DRY_RUN; then
        say "download $url -> $file$([ "$size" = - ] || say " ($(human "$size"))")"
        return
    fi
    if [ "$size" = - ]; then
        size=$(remote_size "$url") || die "$url cannot be reached; try again later, or name a mirror (see --help)"
        size=${size:--}
    fi
    [ ! -e "$part" ] || had=$(size_of "$part")
    # Space for the rest of the archive and for its contents.
    [ "$size" = - ] || need_space $((2 * size - had))
    if [ "$size" != - ] && [ "$had" -ge "$size" ]; then
        say "complete $part"
    else
        [ "$had" = 0 ] || say "resume   $part at $(human "$had")"
        say "download $url"
        curl_safely --progress-bar --continue-at - --output "$part" "$url" ||
            die "$url: download failed; run again to resume, or name a mirror (see --help)"
    fi
    fault=$(check "$part" "$size" "$md5")
    if [ -n "$fault" ]; then
        mv -f "$part" "$file.bad"
        die "$url: the download $fault; kept as $file.bad, run again to start anew"
    fi
    mv "$part" "$file"
}

# unpack ARCHIVE SUBFOLDER TARGET: move the entries of the archive's SUBFOLDER (. for its top level) to the folder
# TARGET. Existing entries are not changed; after an interruption no entry is incomplete.
unpack() {
    local archive=$1 subfolder=$2 target=$3 entry name
    if $DRY_RUN; then
        say "unpack   $archive -> $target"
        return
    fi
    SCRATCH=$(mktemp -d "$DIR/.unpack.XXXXXX")
    trap 'rm -rf "$SCRATCH"' EXIT
    say "unpack   $archive"
    case "$archive" in
        *.zip)
            need_space "$(unzip -l "$archive" | awk 'END { print $1 }')"
            unzip -q "$archive" -d "$SCRATCH" || die "$archive is damaged; move it away and run again"
            ;;
        *)
            need_space "$(size_of "$archive")"
            tar -xf "$archive" -C "$SCRATCH" || die "$archive is damaged; move it away and run again"
            ;;
    esac
    [ -d "$SCRATCH/$subfolder" ] || die "$archive has no folder $subfolder; is it the right archive?"
    mkdir -p "$target"
    for entry in "$SCRATCH/$subfolder"/*; do
        name=$(basename "$entry")
        if [ -e "$target/$name" ]; then
            say "have     $target/$name (left as it is)"
        elif [ "$name" != __MACOSX ]; then
            mv "$entry" "$target/$name"
        fi
    done
    rm -rf "$SCRATCH"
    trap - EXIT
}

count_files() { find "$1" -maxdepth 1 -name "$2" | wc -l | tr -d ' '; }
