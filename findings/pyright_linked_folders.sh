#!/usr/bin/env bash
# pyright does not look into a folder that is a symbolic link when the folder around it is in `include`: it reports
# "0 errors" for files with errors, and says nothing of having left them out. Imports through the link are resolved, and
# the same folder named in `include` by the link's own path is checked.
# Who keeps a package's parts in folders of their own and links them into the package has to list the links.
# Seen with pyright 1.1.414 (PyPI), 2026-12-01:
#   include = ["pack"]                  0 errors, 0 warnings, 0 informations     (1 file of 3)
#   include = ["pack", "pack/part"]     1 error, 0 warnings, 0 informations
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check pyright==1.1.414

mkdir part pack
ln -s ../part pack/part
touch pack/__init__.py part/__init__.py
echo 'number: int = "text"' >part/wrong.py

check() {  # the closing line of pyright for this `include`
  echo "{\"include\": $1}" >pyrightconfig.json
  venv/bin/pyright --stats 2>&1 | grep -E "^[0-9]+ error|^Total files checked" || true
}
around=$(check '["pack"]')
named=$(check '["pack", "pack/part"]')
printf 'include = ["pack"]:\n%s\ninclude = ["pack", "pack/part"]:\n%s\n' "$around" "$named"
[[ $around == *"0 errors"* && $around == *"Total files checked: 1"* ]] || { echo "changed: the linked folder is checked"; exit 1; }
[[ $named == *"1 error"* ]] || { echo "changed: a link in include is not followed"; exit 1; }
echo "as it was"
