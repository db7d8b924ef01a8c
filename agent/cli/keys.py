"""`gatelet keys`: the API keys of endpoints that are deployed with SCORING_AUTH=key."""

from __future__ import annotations

import argparse

from .command import CommandError, add_config_option, add_json_option, configuration, print_json


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("keys", help="show or regenerate the API keys of an endpoint")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print both keys, and make them if there are none")
    regenerate = actions.add_parser("regenerate", help="replace one key; the other one stays valid")
    for one, run in ((show, _show), (regenerate, _regenerate)):
        one.add_argument("endpoint", help="as clients name it: SCORING_ENDPOINT, or the module")
        add_config_option(one)
        add_json_option(one)
        one.set_defaults(run=run)
    regenerate.add_argument(
        "--key", required=True, type=str.lower, choices=("primary", "secondary")
    )
    regenerate.add_argument("--set", default="", metavar="KEY", help="use this one")


def _show(arguments: argparse.Namespace) -> int:
    return _change(arguments, "")


def _regenerate(arguments: argparse.Namespace) -> int:
    return _change(arguments, arguments.key)


def _change(arguments: argparse.Namespace, which: str) -> int:
    from ..scoring.keys import KeyStore, KeysUnusable

    store = KeyStore(configuration(arguments).scoring_keys_dir)
    try:
        if which:
            keys = store.regenerate(arguments.endpoint, which, arguments.set)
        else:
            keys = store.show(arguments.endpoint)
    except KeysUnusable as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        print_json({"primary": keys.primary, "secondary": keys.secondary})
    else:
        print(f"primary    {keys.primary}\nsecondary  {keys.secondary}")
    return 0
