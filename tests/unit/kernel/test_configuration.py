# SPDX-License-Identifier: Apache-2.0
"""Fragments of a kernel's configuration: ours, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclavekit.errors import Error, FormatError, KernelBuildError, UsageError
from enclavekit.kernel.configuration import (
    OPTIONAL,
    Option,
    Target,
    check,
    encode,
    fragments,
    merge,
    parse,
    parse_final,
)


@pytest.mark.parametrize("target", Target)
def test_each_option_of_ours_has_a_reason_of_its_own(target: Target) -> None:
    options = [option for name, text in fragments(target, OPTIONAL) for option in parse(text, name)]
    assert len(options) > 100
    assert [option.name for option in options if not option.reason] == []


@pytest.mark.parametrize("target", Target)
def test_no_option_of_ours_stands_twice(target: Target) -> None:
    names = [option.name for name, text in fragments(target, OPTIONAL) for option in parse(text, name)]
    assert sorted(set(names)) == sorted(names)


def test_a_fragment_is_read_with_its_reasons() -> None:
    text = "# of a kind\n\n# the only way out\nCONFIG_VSOCKETS=y\n# CONFIG_PCI is not set\nCONFIG_NR_CPUS=64\n"
    assert parse(text, "a") == [
        Option("CONFIG_VSOCKETS", "y", "the only way out", "a"),
        Option("CONFIG_PCI", "n", "", "a"),
        Option("CONFIG_NR_CPUS", "64", "", "a"),
    ]


def test_what_is_no_option_is_refused_with_its_line() -> None:
    with pytest.raises(FormatError) as refused:
        parse("CONFIG_A=y\nCONFIG_B=`rm`\n", "mine.config")
    assert str(refused.value) == "mine.config: line 2: got 'CONFIG_B=`rm`', expected CONFIG_NAME=VALUE or a comment"


@given(st.text())
def test_any_text_is_options_or_an_error(text: str) -> None:
    try:
        options = parse(text, "any")
    except Error:
        return
    assert parse(encode(merge(options)), "any") == [
        Option(option.name, option.value, "", "any") for _, option in sorted(merge(options).items())
    ]


def test_the_last_word_counts() -> None:
    options = merge([*parse("CONFIG_A=y\nCONFIG_B=y\n", "a"), *parse("# CONFIG_A is not set\n", "b")])
    assert encode(options) == "CONFIG_A=n\nCONFIG_B=y\n"


def test_what_the_kernel_made_otherwise_is_told() -> None:
    options = merge(parse("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=7\n", "mine"))
    final = parse_final("CONFIG_B=y\nCONFIG_C=7\n# CONFIG_D is not set\n")
    with pytest.raises(KernelBuildError) as refused:
        check(options, final)
    assert str(refused.value) == (
        "configuration: CONFIG_A is not set, expected y (mine); CONFIG_B is y, expected n (mine)"
    )
    check(options, {"CONFIG_A": "y", "CONFIG_C": "7"})


def test_netfilter_is_kept_out_unless_asked_for() -> None:
    plain = merge(option for name, text in fragments(Target.X86_64) for option in parse(text, name))
    asked = merge(option for name, text in fragments(Target.X86_64, ["netfilter"]) for option in parse(text, name))
    assert "CONFIG_NETFILTER" not in plain
    assert asked["CONFIG_NETFILTER"].value == "y"


def test_fragments_of_the_user_come_last(tmp_path: Path) -> None:
    mine = tmp_path / "mine.config"
    mine.write_text("CONFIG_IPV6=n\n")
    assert fragments(Target.X86_64, [str(mine)])[-1] == (str(mine), "CONFIG_IPV6=n\n")
    with pytest.raises(UsageError, match="fragment 'nothing': no such file, and none of that name"):
        fragments(Target.X86_64, ["nothing"])
    mine.write_bytes(b"#" * 70000)
    with pytest.raises(FormatError, match="more than 65536 bytes"):
        fragments(Target.X86_64, [str(mine)])
