# shellcheck shell=bash
# The virtual environment that the scripts here work in. To be sourced, with bash 3.2 or later, on Linux or macOS.
#
#   jddim_environment EXTRA,... makes, repairs or updates .venv: the project with these extras in it; sets JDDIM_PYTHON
#   jddim_find_python           sets JDDIM_BASE, the Python for new environments: JDDIM_PYTHON_BASE, PYTHON, or one on PATH
#   jddim_venv DIR ARGUMENTS    runs `pip install ARGUMENTS` in DIR, an absolute path, which is made first if need be
#
# pip reads the user's own settings. What is said goes to stdout; stderr gets one line, and only on failure.
# .venv/jddim-state says what .venv holds (the extras, then a key of what they depend on), or "unfinished".

JDDIM_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# Another environment's settings would decide where packages go, or put its modules before ours.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV __PYVENV_LAUNCHER__ PIP_TARGET PIP_PREFIX PIP_USER

jddim_fail() {
  printf 'error: %s\n' "$*" >&2
  return 1
}

# Prints a Python's version, and what it lacks; fails if it is of no use. (A name on PATH may be a shim of none.)
jddim_version() {
  "$1" -E -c '
import sys
sys.path = sys.path[1:]  # without the folder that this runs in
said, good = "%d.%d.%d" % sys.version_info[:3], sys.version_info[:2] >= (3, 11)
try:
    import ensurepip, venv
except ImportError:
    good, said = False, said + " without its venv module (on Debian: apt install python%d.%d-venv)" % sys.version_info[:2]
print(said)
sys.exit(not good)' 2>/dev/null </dev/null
}

jddim_find_python() {
  local asked=${JDDIM_PYTHON_BASE:-${PYTHON:-}} name path version seen='' names
  if [ -n "$asked" ]; then names=("$asked"); else names=(python3 python3.13 python3.12 python3.11 python); fi
  for name in "${names[@]}"; do
    while IFS= read -r path; do
      [ -n "$path" ] || continue
      # Newer ones than the suite runs on are used if named.
      if version=$(jddim_version "$path") && { [ -n "$asked" ] || [[ $version == 3.1[123].* ]]; }; then
        JDDIM_BASE=$path && return
      fi
      seen="${seen:+$seen, }$path (${version:-does not run})"
    done <<<"$(type -aP -- "$name" || true)"
  done
  jddim_fail "jddim needs Python 3.11, 3.12 or 3.13; ${asked:+JDDIM_PYTHON_BASE or PYTHON names $asked; }found:" \
    "${seen:-none}. Name one: JDDIM_PYTHON_BASE=/path/to/python3.12 $0"
}

jddim_venv() {
  local dir=$1 log=$1/install.log rc=0 reason
  shift
  { mkdir -p -- "$dir" && : >"$log"; } 2>/dev/null || jddim_fail "cannot write $dir" || return
  printf 'installing into %s: a minute or two if much is missing ...\n' "$dir"
  (
    trap 'exit 130' INT TERM # the first Ctrl-C ends pip; this keeps the shell from going on
    { [ -x "$dir/bin/python" ] || "$JDDIM_BASE" -I -m venv "$dir"; } &&
      { "$dir/bin/python" -I -m pip --version || "$dir/bin/python" -I -m ensurepip; } &&
      "$dir/bin/python" -I -m pip --no-input --disable-pip-version-check install --progress-bar off \
        -c "$JDDIM_ROOT/scripts/constraints.txt" "$@"
  ) >"$log" 2>&1 </dev/null || rc=$?
  [ "$rc" -ne 0 ] || return 0
  [ "$rc" -lt 128 ] || jddim_fail "interrupted; run the command again to start over" || return 130
  reason=$(grep -oE 'No space left on device|connection broken by|ERROR: No matching distribution .*' "$log" | head -n 1 || true)
  [ -n "$reason" ] || reason=$(tail -n 1 "$log" | cut -c 1-300)
  reason=${reason/#connection broken by/the package index cannot be reached}
  jddim_fail "cannot install into $dir: ${reason:-no reason given, is the disk full?}; log: $log"
}

# Whether .venv is as it should be. Else sets _jddim_broken, if it has to be made anew, to why.
_jddim_ready() {
  local venv=$JDDIM_ROOT/.venv version key='' asked='' extra
  _jddim_broken='' _jddim_held=''
  [ -z "${JDDIM_PYTHON_BASE:-${PYTHON:-}}" ] || { jddim_find_python && asked=$(jddim_version "$JDDIM_BASE"); } || exit
  [ -e "$venv" ] || [ -L "$venv" ] || return
  if [ ! -f "$venv/pyvenv.cfg" ] || ! version=$(jddim_version "$venv/bin/python"); then
    _jddim_broken='its Python does not run, or is too old'
  elif [ "${asked%.*}" != "${asked:+${version%.*}}" ]; then
    _jddim_broken="its Python is $version, $asked is asked for"
  elif [ -e "$venv/jddim-state" ]; then
    { read -r _jddim_held && read -r key; } <"$venv/jddim-state" || true
    [ "$_jddim_held" != unfinished ] || _jddim_broken='its set-up did not finish'
  fi
  [ -z "$_jddim_broken" ] && [ "$key" = "$(_jddim_key)" ] || return
  for extra in ${1//,/ }; do [[ " $_jddim_held " == *" $extra "* ]] || return; done
}

# An editable install remembers where the checkout is.
_jddim_key() { printf '%s ' "$JDDIM_ROOT" && cat -- "$JDDIM_ROOT/pyproject.toml" "$JDDIM_ROOT/scripts/constraints.txt" | cksum; }

_jddim_set_up() {
  local venv=$JDDIM_ROOT/.venv state=$JDDIM_ROOT/.venv/jddim-state before rc=0
  ! _jddim_ready "$1" || return 0 # another run may have done it meanwhile
  [ -z "$_jddim_broken" ] || printf 'making .venv anew: %s\n' "$_jddim_broken"
  if [ -n "$_jddim_broken" ] || [ ! -e "$venv" ]; then
    jddim_find_python || return
    _jddim_held=''
    rm -rf -- "$venv.old" && { [ -z "$_jddim_broken" ] || mv -- "$venv" "$venv.old"; } && rm -rf -- "$venv.old" || return
  fi
  before=$(cat -- "$state" 2>/dev/null) || true
  { mkdir -p -- "$venv" && echo unfinished >"$state"; } 2>/dev/null || jddim_fail "cannot write $venv" || return
  jddim_venv "$venv" -e "${JDDIM_ROOT}[${_jddim_held:+${_jddim_held// /,},}$1]" || rc=$?
  if [ "$rc" -eq 0 ]; then # the extras, with those that they contain
    "$venv/bin/python" -I -c '
import re, sys, tomllib
extras, held = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"], sys.argv[2:]
for extra in held:
    inner = re.findall(r"jddim\[(.*?)\]", " ".join(extras.get(extra, [])))
    held += [name for name in re.findall(r"[\w-]+", " ".join(inner)) if name not in held]
print(*[extra for extra in held if extra in extras])' "$JDDIM_ROOT/pyproject.toml" ${1//,/ } $_jddim_held >"$state" &&
      _jddim_key >>"$state"
  elif [ "$rc" -eq 1 ] && [ -n "$before" ] && ! grep -q 'No space left' "$venv/install.log"; then
    printf '%s\n' "$before" >"$state" # pip has changed nothing
  fi
  return "$rc"
}

jddim_environment() {
  export JDDIM_PYTHON=$JDDIM_ROOT/.venv/bin/python
  _jddim_ready "$1" && return
  # One run at a time where there is flock. pip inherits the lock: it holds even if the script that started pip is killed.
  (
    { flock 9 || true; } 2>/dev/null
    _jddim_set_up "$1"
  ) 9<"$JDDIM_ROOT"
}
