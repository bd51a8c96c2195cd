# Sourced by the other scripts: makes the virtual environment .venv beside the repository's files, once.
# QJAX_PYTHON chooses the interpreter (3.11 or newer); QJAX_VENV another place for the environment.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${QJAX_VENV:-$root/.venv}

# ensure_environment EXTRAS...: installs qjax (editable) with these extras, unless this was done for this pyproject.toml
ensure_environment() {
  local extras stamp
  extras=$(IFS=,; echo "$*")
  stamp=$venv/.installed-$extras-$(cksum <"$root/pyproject.toml" | cut -d' ' -f1)
  if [ ! -e "$stamp" ]; then
    if [ ! -x "$venv/bin/python" ]; then
      echo "Making $venv ..."
      "${QJAX_PYTHON:-python3}" -m venv "$venv"
    fi
    echo "Installing qjax-compiler[$extras] ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[$extras]"
    touch "$stamp"
  fi
}

# phase NAME: begins a part of a script; `phases` prints the seconds that each took.
phase_names=()
phase_starts=()
phase() {
  phase_names+=("$1")
  phase_starts+=("$SECONDS")
  echo "== $1"
}

phases() {
  local i
  echo "== where the time went"
  for i in "${!phase_names[@]}"; do
    printf '%6d s  %s\n' "$((${phase_starts[i + 1]:-$SECONDS} - phase_starts[i]))" "${phase_names[i]}"
  done
}
