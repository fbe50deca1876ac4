"""Prints pip's settings as uv's: lines of NAME=VALUE for environment.sh to export before it runs uv.

uv reads neither PIP_* variables nor pip.conf. Where to install from and how to get there is taken over,
unless the user has set the UV_ variable (or SSL_CERT_FILE) as well. Variables win over pip.conf, as with pip.
"""

import ast
import os
import subprocess
import sys

# (names of the pip setting, uv's variable, what uv puts between values)
SETTINGS = [
    (("index-url",), "UV_DEFAULT_INDEX", " "),
    (("extra-index-url",), "UV_INDEX", " "),
    (("find-links",), "UV_FIND_LINKS", ","),
    (("trusted-host",), "UV_INSECURE_HOST", " "),
    (("timeout", "default-timeout"), "UV_HTTP_TIMEOUT", " "),
    (("cert",), "SSL_CERT_FILE", " "),
    (("proxy",), "ALL_PROXY", " "),
]


def pip_configuration() -> dict[str, str]:
    """What pip is configured to, its files and variables merged: {"find-links": "...", ...}.

    The `[install]` section wins over `[global]`, variables over both. Without pip there is nothing in its
    files that the user could expect to hold, and only the variables count.
    """
    merged: dict[str, dict[str, str]] = {
        "global": {},
        "install": {},
        ":env:": {
            name[4:].lower().replace("_", "-"): value for name, value in os.environ.items() if name.startswith("PIP_")
        },
    }
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for line in listed.stdout.decode(errors="replace").splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        if section in ("global", "install"):
            merged[section][option] = str(ast.literal_eval(value))
    return merged["global"] | merged["install"] | {k: v for k, v in merged[":env:"].items() if v.strip()}


def main() -> None:
    pip = pip_configuration()
    for names, variable, separator in SETTINGS:
        value = next((pip[name] for name in names if name in pip), "")
        if value.strip() and not os.environ.get(variable):
            print(f"{variable}={separator.join(value.split())}")
            if variable == "UV_INDEX" and not os.environ.get("UV_INDEX_STRATEGY"):
                # pip takes the best version of all indexes; uv by default that of the first which has any.
                print("UV_INDEX_STRATEGY=unsafe-best-match")
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        print("JDDIM_UV_NO_INDEX=1")  # uv has no variable for it


if __name__ == "__main__":
    main()
