"""Names, limits, and what makes a labelling."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.prompts import DEFAULT_TEMPLATES
from service.domain.tenant import ClassSpec, TenantConfig, checked, class_id, class_name, tenant_name
from service.errors import DuplicateClass, InvalidRequest, LimitExceeded, UnknownClass
from service.settings import Settings

LIMITS = Settings(max_classes=3, max_prompts=8, max_text_chars=256, max_slots=5)


def config(*names: str, **others: object) -> TenantConfig:
    made = TenantConfig(classes=tuple(ClassSpec(name=name) for name in names), slots=5)
    return replace(made, **others)  # type: ignore[arg-type]


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "default", "A.b_c-d", "a" * 64, "a..", "0-"])
def test_a_tenants_name_is_letters_digits_dots_underscores_hyphens(name: str) -> None:
    assert tenant_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "_a", "-a", "a" * 65, "a b", "a/b", "a\n", "\na", "é", "a\0", "a:b", "{"]
)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        tenant_name(name)


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        ("cat", "cat"),
        ("  cat \t\n", "cat"),
        ("cafe\u0301", "caf\u00e9"),
        ("caf\u00e9", "caf\u00e9"),
        ("a  b", "a  b"),
        ("\u212b", "\u00c5"),
        ("\ufb01", "\ufb01"),
        ("Cat", "Cat"),
        ("a/b?c#d%2F", "a/b?c#d%2F"),
        ("\u200d", "\u200d"),
        ("x" * 256, "x" * 256),
        ("e\u0301" * 256, "\u00e9" * 256),
    ],
)
def test_a_class_name_is_kept_in_nfc_without_space_around_it(given_: str, kept: str) -> None:
    assert class_name(given_) == kept


@pytest.mark.parametrize("name", ["", " ", "\t\n", "x" * 257, "a\0b", "a\nb", "a\x1bb", "a\x7fb", "a\x85b", "\ud800"])
def test_an_empty_long_or_garbled_class_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        class_name(name)


@given(st.text(max_size=20))
@settings(max_examples=100)
def test_a_tidied_name_is_tidy(name: str) -> None:
    try:
        tidy = class_name(name)
    except InvalidRequest:
        assume(condition=False)
    assert class_name(tidy) == tidy
    assert unicodedata.is_normalized("NFC", tidy)
    assert class_name(unicodedata.normalize("NFD", name)) == tidy


def test_a_class_keeps_its_id_wherever_it_stands_and_however_it_is_described() -> None:
    assert ClassSpec(name="cat").id == ClassSpec(name="cat", prompts=("x",)).id == class_id("cat")
    assert len({class_id(name) for name in ("cat", "Cat", "cat ", "c\u00e4t", "ca\u0308t")}) == 5


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_configuration_is_tidied() -> None:
    given_ = config(" cafe\u0301 ", templates=(" a {}. ",))
    given_ = replace(given_, classes=(*given_.classes, ClassSpec(name="b", prompts=(" one. ", "cafe\u0301"))))
    tidy = checked(given_, LIMITS)
    assert tidy.classes == (ClassSpec(name="caf\u00e9"), ClassSpec(name="b", prompts=("one.", "caf\u00e9")))
    assert tidy.templates == ("a {}.",)
    assert checked(tidy, LIMITS) == tidy


def test_the_default_configuration_is_a_tidy_one_without_classes() -> None:
    assert checked(TenantConfig(), Settings()) == TenantConfig()
    assert TenantConfig().classes == ()


@pytest.mark.parametrize("names", [("a", "a"), ("a", " a"), ("caf\u00e9", "cafe\u0301"), ("a", "b", "a")])
def test_a_class_that_is_named_twice_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(DuplicateClass):
        checked(config(*names), LIMITS)


def test_names_that_differ_in_case_are_two_classes() -> None:
    assert len(checked(config("a", "A"), LIMITS).classes) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        config("a", "b", "c", "d"),
        config("a", templates=("{}",) * 9),
        config("a", slots=6),
        config(classes=(ClassSpec(name="a", prompts=("x",) * 9),)),
    ],
)
def test_more_than_the_limits_is_refused(wrong: TenantConfig) -> None:
    with pytest.raises(LimitExceeded, match="at most"):
        checked(wrong, LIMITS)


def test_exactly_the_limits_are_allowed() -> None:
    most = config("a", "b", templates=("{}",) * 8, slots=5)
    most = replace(most, classes=(*most.classes, ClassSpec(name="c", prompts=("x" * 256,) * 8)))
    assert checked(most, LIMITS) == most


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": -1},
        {"beta": -0.1},
        {"beta": float("nan")},
        {"beta": float("inf")},
        {"weights": (0.0, 0.0, 0.0)},
        {"weights": (1.0, -1.0, 1.0)},
        {"weights": (1.0, float("nan"), 1.0)},
        {"weights": (1.0, float("inf"), 1.0)},
        {"templates": ("no place for the name",)},
        {"templates": ("",)},
        {"templates": ("{}" * 200,)},
        {"templates": ()},
        {"classes": (ClassSpec(name="a", prompts=("",)),)},
        {"classes": (ClassSpec(name="a", prompts=("x" * 257,)),)},
        {"classes": (ClassSpec(name="a", prompts=("x\ny",)),)},
    ],
)
def test_a_malformed_value_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        checked(config("a", **wrong), LIMITS)


def test_a_class_with_sentences_needs_no_templates() -> None:
    own = config(templates=(), classes=(ClassSpec(name="a", prompts=("a sentence.",)),))
    assert checked(own, LIMITS).prompts(own.classes[0]) == ("a sentence.",)


@pytest.mark.parametrize("values", [{"slots": 0}, {"beta": 0.0}, {"weights": (0.0, 0.0, 1.0)}])
def test_values_at_their_edge_are_allowed(values: dict[str, object]) -> None:
    checked(config("a", **values), LIMITS)


# Prompts and labelling ------------------------------------------------------------------------------------------------


def test_prompts_are_the_filled_templates_and_then_the_sentences() -> None:
    spec = ClassSpec(name="golden_retriever {}", prompts=("A big {} dog_s.",))
    assert config(templates=("a {}.", "{} {}")).prompts(spec) == (
        "a golden retriever {}.",
        "golden retriever {} golden retriever {}",
        "A big {} dog_s.",
    )
    assert len(TenantConfig().prompts(spec)) == len(DEFAULT_TEMPLATES) + 1


@given(st.permutations(["a", "b", "c", "d"]))
@settings(max_examples=100)
def test_the_labelling_does_not_depend_on_the_order_of_the_classes(names: list[str]) -> None:
    assert config(*names).labelling == config("a", "b", "c", "d").labelling


BASE = config(templates=("a {}.", "the {}."), classes=(ClassSpec(name="a", prompts=("x", "y")), ClassSpec(name="b")))


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, templates=("a {}.",)),
        replace(BASE, templates=("a {}.", "the {}!")),
        replace(BASE, templates=("a {}.", "the {}.", "{}")),
        replace(BASE, classes=BASE.classes[:1]),
        replace(BASE, classes=(*BASE.classes, ClassSpec(name="c"))),
        replace(BASE, classes=(ClassSpec(name="a", prompts=("x",)), BASE.classes[1])),
        replace(BASE, classes=(ClassSpec(name="a", prompts=("x", "z")), BASE.classes[1])),
        replace(BASE, classes=(ClassSpec(name="a"), ClassSpec(name="b", prompts=("x", "y")))),
        replace(BASE, classes=(ClassSpec(name="A", prompts=("x", "y")), ClassSpec(name="b"))),
    ],
)
def test_any_class_or_prompt_that_changes_changes_the_labelling(other: TenantConfig) -> None:
    assert other.labelling != BASE.labelling


@pytest.mark.parametrize(
    "values", [{"slots": 1}, {"beta": 1.0}, {"weights": (1.0, 0.0, 0.0)}, {"learn": False}, {"retention": "images"}]
)
def test_nothing_else_changes_the_labelling(values: dict[str, object]) -> None:
    assert replace(BASE, **values).labelling == BASE.labelling  # type: ignore[arg-type]


def test_sentences_cannot_move_between_classes_unseen() -> None:
    one = config(templates=(), classes=(ClassSpec(name="a", prompts=("x", "y")), ClassSpec(name="b", prompts=("z",))))
    two = config(templates=(), classes=(ClassSpec(name="a", prompts=("x",)), ClassSpec(name="b", prompts=("y", "z"))))
    assert one.labelling != two.labelling


# Adding and removing --------------------------------------------------------------------------------------------------


def test_classes_are_added_at_the_end_and_removed_by_name() -> None:
    more = config("a", "b").with_classes([ClassSpec(name="c")])
    assert [spec.name for spec in more.classes] == ["a", "b", "c"]
    assert [spec.name for spec in more.without("b").classes] == ["a", "c"]


@pytest.mark.parametrize("name", ["c", "A", "a ", ""])
def test_a_class_that_is_not_there_is_told_so(name: str) -> None:
    with pytest.raises(UnknownClass):
        config("a", "b").spec(name)
    with pytest.raises(UnknownClass):
        config("a", "b").without(name)
