# shellcheck shell=bash
# Sourced by the other scripts: where the local store keeps its models (the same rule as src/store.rs).
store_models() {
    if [ -n "${RUSHLIGHT_HOME-}" ]; then
        echo "$RUSHLIGHT_HOME/models"
    elif [ "$(uname -s)" = Darwin ]; then
        echo "$HOME/Library/Application Support/rushlight/models"
    else
        case "${XDG_DATA_HOME-}" in
        /*) echo "$XDG_DATA_HOME/rushlight/models" ;;
        *) echo "$HOME/.local/share/rushlight/models" ;;
        esac
    fi
}
