# shellcheck shell=bash
# The virtual environment that scripts/demo, scripts/test, scripts/bench and .ci/run work in. To be sourced: it
# only defines functions. Works with bash 3.2 (macOS) and later, Linux and macOS.
#
#   jddim_environment EXTRA    makes or repairs .venv with the project and that extra in it, sets JDDIM_PYTHON
#   jddim_find_python          sets JDDIM_BASE to the Python that .venv is made from
#   jddim_make_venv DIR        an empty virtual environment in DIR, from JDDIM_BASE
#   jddim_install DIR WHAT ... installs into DIR with the arguments of `pip install`; WHAT names it to the user
#   jddim_export_uv_settings   lets uv run by hand read pip's settings
#
# Settings: JDDIM_PYTHON_BASE (or PYTHON) names the Python to use. uv is used when it is on PATH, pip otherwise;
# both read the user's own settings. What is said goes to stdout; stderr gets one line, and only on failure.
#
# .venv/jddim-state.json is written after everything else and says what is installed; .venv/jddim-unfinished
# exists while something is being changed. See environment_state.py.

JDDIM_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

_jddim_say() { printf '%s\n' "$*"; }
_jddim_fail() { printf 'error: %s\n' "$*" >&2; }

# ---------------------------------------------------------------------------------------------- which Python

# Prints "3.12.1 venv", or "3.12.1 -" if that Python can't make environments by itself. Fails if it does not run:
# a name on PATH may be a version manager's shim for a Python that is not installed. Python 2 can read this.
_jddim_probe() {
  "$1" -c '
import sys
try:
    import ensurepip, venv
    able = "venv"
except ImportError:
    able = "-"
sys.stdout.write("%d.%d.%d %s\n" % (sys.version_info[:3] + (able,)))
' 2>/dev/null </dev/null
}

_jddim_has_uv() { command -v uv >/dev/null 2>&1; }

# _jddim_fits PROBED OLDEST NEWEST: whether a probe's answer is Python 3.OLDEST to 3.NEWEST and can be used.
_jddim_fits() {
  local major minor rest
  IFS=. read -r major minor rest <<<"${1%% *}"
  [ "$major" = 3 ] && [ "$minor" -ge "$2" ] && [ "$minor" -le "$3" ] || return 1
  [ "${1##* }" = venv ] || _jddim_has_uv
}

jddim_find_python() {
  local asked=${JDDIM_PYTHON_BASE:-${PYTHON:-}} name path probed seen='' later='' without_venv=''
  if [ -n "$asked" ]; then
    name=PYTHON
    [ -z "${JDDIM_PYTHON_BASE:-}" ] || name=JDDIM_PYTHON_BASE
    if ! path=$(type -P -- "$asked") || ! probed=$(_jddim_probe "$path"); then
      _jddim_fail "$name=$asked does not run; set it to a Python 3.11, 3.12 or 3.13, or unset it"
      return 1
    fi
    if _jddim_fits "$probed" 11 99; then
      JDDIM_BASE=$path
      return 0
    fi
    if [ "${probed##* }" = - ] && _jddim_fits "${probed%% *} venv" 11 99; then
      _jddim_no_venv "$path" "${probed%% *}"
    else
      _jddim_fail "$name=$asked is Python ${probed%% *}; jddim needs 3.11, 3.12 or 3.13"
    fi
    return 1
  fi

  # The user's python3 first, then the newest that is tested. Every match on PATH counts, not only the first.
  for name in python3 python3.13 python3.12 python3.11 python python3.14; do
    while IFS= read -r path; do
      [ -n "$path" ] || continue
      if ! probed=$(_jddim_probe "$path"); then
        seen="$seen, $path does not run"
      elif _jddim_fits "$probed" 11 13; then
        JDDIM_BASE=$path
        return 0
      else
        seen="$seen, $path is ${probed%% *}"
        if [ -z "$later" ] && _jddim_fits "$probed" 14 99; then
          later=$path
        elif [ -z "$without_venv" ] && _jddim_fits "${probed%% *} venv" 11 99; then
          without_venv="$path ${probed%% *}"
        fi
      fi
    done <<<"$(type -aP "$name" || true)"
  done
  # uv may have installed one of its own. It is not asked to download one: only the package index may be needed.
  if _jddim_has_uv && path=$(uv python find --no-project --no-python-downloads '>=3.11,<3.14' 2>/dev/null) &&
    probed=$(_jddim_probe "$path") && _jddim_fits "$probed" 11 13; then
    JDDIM_BASE=$path
    return 0
  fi
  if [ -n "$later" ]; then
    _jddim_say "using $later, which is newer than the Pythons jddim is tested with (3.11, 3.12, 3.13)"
    JDDIM_BASE=$later
    return 0
  fi
  if [ -n "$without_venv" ]; then
    _jddim_no_venv "${without_venv% *}" "${without_venv##* }"
    return 1
  fi
  seen=${seen#, }
  _jddim_fail "jddim needs Python 3.11, 3.12 or 3.13; found: ${seen:-no Python at all}." \
    "Install one, or name one: JDDIM_PYTHON_BASE=/path/to/python3.12 ${0}"
  return 1
}

_jddim_no_venv() {
  local minor=${2#3.}
  _jddim_fail "$1 (Python $2) lacks the venv and ensurepip modules; on Debian and Ubuntu:" \
    "apt install python3.${minor%%.*}-venv (or install uv, or name another Python by JDDIM_PYTHON_BASE)"
}

# ---------------------------------------------------------------------------------------- making, installing

# Another environment's settings would decide where packages go, or put its modules before ours.
_jddim_leave_other_environments() {
  unset PYTHONPATH PYTHONHOME VIRTUAL_ENV __PYVENV_LAUNCHER__ PIP_TARGET PIP_PREFIX PIP_USER UV_PYTHON \
    UV_SYSTEM_PYTHON UV_PROJECT_ENVIRONMENT
}

jddim_make_venv() {
  local dir=$1 log=$1/install.log
  if ! mkdir -p -- "$dir" 2>/dev/null || ! : >"$dir/jddim-unfinished" 2>/dev/null; then
    _jddim_fail "cannot write $dir"
    return 1
  fi
  if _jddim_has_uv; then
    uv venv --no-project --allow-existing --python "$JDDIM_BASE" "$dir"
  else
    "$JDDIM_BASE" -m venv "$dir"
  fi >"$log" 2>&1 </dev/null && "$dir/bin/python" -c '' >>"$log" 2>&1 && return 0
  _jddim_fail "cannot make a virtual environment in $dir with $JDDIM_BASE: $(_jddim_reason "$log"); log: $log"
  return 1
}

# uv does not read pip's settings (PIP_* variables, pip.conf): without this, someone whose pip is set up for a
# mirror, a folder of wheels or a company's certificate would get an error, or other builds of the packages.
jddim_export_uv_settings() {
  local setting
  while IFS= read -r setting; do
    [ -z "$setting" ] || export "${setting?}"
  done <<<"$("$JDDIM_BASE" -I "$JDDIM_ROOT/scripts/uv_settings.py")"
}

# The line of an installer's log that says best why it failed.
_jddim_reason() {
  local line
  line=$(grep -aE '^ *(ERROR|error|cause|Error)' "$1" | grep -avE 'subprocess-exited-with-error|Failed to build|^ *ERROR: Ignored|Could not find a version' |
    tail -n 1 | sed -E 's/^ *((ERROR|error|cause|Error): *)?//' | cut -c 1-300)
  if [ -z "$line" ]; then
    line=$(grep -aE '[^[:space:]]' "$1" | tail -n 1 | cut -c 1-300)
  fi
  printf '%s' "${line:-no output}"
}

# What the network said, if the log has an error of the network (pip's words, then uv's).
_jddim_network_reason() {
  local cause='Connection refused|Connection reset by peer|Name or service not known|No address associated'
  cause="$cause|Temporary failure in name resolution|nodename nor servname|Network is unreachable|No route to host"
  cause="$cause|CERTIFICATE_VERIFY_FAILED|invalid peer certificate|[Tt]imed out|Tunnel connection failed|Cannot connect to proxy"
  cause="$cause|not a trusted or secure host|[45][0-9][0-9] (Client|Server) Error|HTTP status [a-z]+ error"
  if grep -aqE 'connection broken by|Failed to fetch|error sending request|HTTPSConnectionPool|HTTPConnectionPool|trusted or secure host' "$1"; then
    cause=$(grep -aoE "$cause" "$1" | tail -n 1)
    printf '%s' "${cause:-connection failed}"
  else
    return 1
  fi
}

# On a terminal: seconds passed and what the installer does, rewritten in place until this shell ends.
_jddim_ticker() {
  local log=$1 parent=$2 start=$SECONDS line
  while sleep 1 && kill -0 "$parent" 2>/dev/null; do
    line=$(tail -n 1 -- "$log" 2>/dev/null | tr -d '\r' | sed -E 's/^ +//; s/ *\([^)]*\)$//' | cut -c 1-60)
    printf '\r\033[K  %3d s  %s' "$((SECONDS - start))" "$line"
  done
}

jddim_install() {
  local dir=$1 what=$2 log=$1/install.log start=$SECONDS rc=0 ticker='' reason
  shift 2
  _jddim_say "installing $what ..."
  if [ -t 1 ]; then
    _jddim_ticker "$log" "$$" &
    ticker=$!
  fi
  (
    # A first Ctrl-C ends the installer; this keeps the shell from going on after it.
    trap 'exit 130' INT TERM
    cd -- "$JDDIM_ROOT" || exit
    if _jddim_has_uv; then
      jddim_export_uv_settings
      if [ "${JDDIM_UV_NO_INDEX:-}" = 1 ]; then
        set -- --no-index "$@"
      fi
      uv pip install --python "$dir/bin/python" "$@"
    else
      "$dir/bin/python" -m pip --no-input --disable-pip-version-check install --progress-bar off "$@"
    fi
  ) >>"$log" 2>&1 </dev/null || rc=$?
  if [ -n "$ticker" ]; then
    kill "$ticker" 2>/dev/null
    wait "$ticker" 2>/dev/null || true
    printf '\r\033[K'
  fi
  if [ "$rc" -eq 0 ]; then
    _jddim_say "installed in $((SECONDS - start)) s"
    return 0
  fi
  if [ "$rc" -ge 128 ] || grep -aq 'Operation cancelled by user' "$log"; then
    _jddim_fail "interrupted; run the command again to start over"
    return 130
  fi
  if reason=$(_jddim_network_reason "$log"); then
    _jddim_fail "cannot install $what: the package index could not be reached ($reason);" \
      "check the network and the index that pip or uv is set to, then run this again; log: $log"
  else
    _jddim_fail "cannot install $what: $(_jddim_reason "$log"); log: $log"
  fi
  return 1
}

# --------------------------------------------------------------------------------------------- the .venv here

# Sets _jddim_found to: ready, absent, install EXTRAS, or broken WHY.
_jddim_look() {
  local extra=$1 venv=$JDDIM_ROOT/.venv asked=${JDDIM_PYTHON_BASE:-${PYTHON:-}} rc=0 found probed
  if [ ! -e "$venv" ] && [ ! -L "$venv" ]; then
    _jddim_found=absent
    return 0
  fi
  if [ -e "$venv/jddim-unfinished" ]; then
    _jddim_found='broken its set-up did not finish'
    return 0
  fi
  if ! probed=$(_jddim_probe "$venv/bin/python"); then
    _jddim_found='broken its Python does not run'
    return 0
  fi
  if ! _jddim_fits "${probed%% *} venv" 11 99; then
    _jddim_found="broken it is made with Python ${probed%% *}"
    return 0
  fi
  if [ -n "$asked" ]; then
    jddim_find_python >/dev/null || return
    found=$(_jddim_probe "$JDDIM_BASE")
    if [ "$(cut -d . -f 1-2 <<<"$found")" != "$(cut -d . -f 1-2 <<<"$probed")" ]; then
      _jddim_found="broken it is made with Python ${probed%% *}, not the ${found%% *} that is asked for"
      return 0
    fi
  fi
  found=$("$venv/bin/python" -I "$JDDIM_ROOT/scripts/environment_state.py" check "$JDDIM_ROOT" "$extra" 2>&1) || rc=$?
  case $rc in
    0) _jddim_found=ready ;;
    3)
      _jddim_found="install $found"
      if ! _jddim_has_uv && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        _jddim_found='broken it has no working pip'
      fi
      ;;
    4) _jddim_found="broken $found" ;;
    *) _jddim_found='broken its Python fails' ;;
  esac
}

_jddim_set_up() {
  local extra=$1 venv=$JDDIM_ROOT/.venv extras=$1 complete='' rc=0
  _jddim_look "$extra" || return # again: another run may have done the work while this one waited for it
  case $_jddim_found in
    ready) return 0 ;;
    install\ *)
      extras=${_jddim_found#install }
      complete=yes
      jddim_find_python >/dev/null 2>&1 || JDDIM_BASE=$venv/bin/python
      : >"$venv/install.log"
      ;;
    *)
      jddim_find_python || return
      if [ "$_jddim_found" != absent ]; then
        _jddim_say "the .venv here cannot be used (${_jddim_found#broken }) and is replaced"
      fi
      if ! rm -rf -- "$venv" 2>/dev/null; then
        _jddim_fail "cannot remove $venv"
        return 1
      fi
      _jddim_say 'making .venv: a minute or two, this time only'
      jddim_make_venv "$venv" || return
      ;;
  esac
  if ! : >"$venv/jddim-unfinished" 2>/dev/null; then
    _jddim_fail "cannot write $venv"
    return 1
  fi
  jddim_install "$venv" "jddim[$extras] into .venv" \
    -e ".[$extras]" -c scripts/constraints.txt || rc=$?
  if [ "$rc" -eq 0 ]; then
    "$venv/bin/python" -I "$JDDIM_ROOT/scripts/environment_state.py" write "$JDDIM_ROOT" "$extras" || return
    if compgen -G "$venv/lib/python*/site-packages/nvidia_cublas-*.dist-info" >/dev/null; then
      _jddim_say "note: torch came with its CUDA libraries (4 GB), which are not used: for this Python, the index" \
        "has no CPU build of the version in scripts/constraints.txt, which says how to get one"
    fi
  fi
  # A failed install into a complete environment changed nothing. An interrupted one may have.
  if [ "$rc" -eq 0 ] || { [ "$rc" -eq 1 ] && [ -n "$complete" ]; }; then
    rm -f -- "$venv/jddim-unfinished"
  fi
  return "$rc"
}

# Runs "$@" while no other run in this checkout does. The installer inherits flock's descriptor, so it holds the
# lock even if the script that started it is killed.
_jddim_alone() {
  local lock=$JDDIM_ROOT/.venv.lock owner said='' rc=0
  if command -v flock >/dev/null 2>&1; then
    flock -n 9 9<"$JDDIM_ROOT" || rc=$?
    if [ "$rc" -le 1 ]; then # above: a file system without locks
      (
        if ! flock -n 9; then
          _jddim_say 'another run is setting up this checkout; waiting for it'
          flock 9
        fi
        "$@"
      ) 9<"$JDDIM_ROOT"
      return
    fi
  fi
  until mkdir -- "$lock" 2>/dev/null; do
    if [ ! -d "$lock" ]; then
      _jddim_fail "cannot write $JDDIM_ROOT"
      return 1
    fi
    owner=$(cat -- "$lock/pid" 2>/dev/null || true)
    if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then
      rm -rf -- "$lock"
      continue
    fi
    if [ -z "$said" ]; then
      _jddim_say "another run is setting up this checkout; waiting for it (if there is none, remove $lock)"
      said=yes
    fi
    sleep 1
  done
  printf '%s\n' "$$" >"$lock/pid"
  (
    trap 'rm -rf -- "$lock"' EXIT
    "$@"
  )
}

jddim_environment() {
  _jddim_leave_other_environments
  _jddim_look "$1" || return
  if [ "$_jddim_found" != ready ]; then
    _jddim_alone _jddim_set_up "$1" || return
  fi
  JDDIM_PYTHON=$JDDIM_ROOT/.venv/bin/python
  export JDDIM_PYTHON
}
