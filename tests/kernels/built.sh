# Sourced by the scripts here, in the repository's root.
# built OBJECT...: the folder of setup.py's build that has them all, seen by ninja to be up to date; nothing where there is none
built() {
  local ninja=.venv/bin/ninja strict='' folder
  [ "${VCR_OPS_CXX_WERROR:-}" != 1 ] || strict=-strict
  folder=$(find build -maxdepth 1 -name 'native-*' -name "*[0-9]$strict" -print -quit 2>/dev/null) || return 0
  [ -n "$folder" ] && [ -x $ninja ] || return 0
  [[ $($ninja -C "$folder" -n "$@" 2>&1) != *'no work to do'* ]] || printf '%s\n' "$folder"
}
