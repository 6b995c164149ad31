"""Fit the two projections of the `lite` encoder and write `core/weights/lite.safetensors`.

Needs only packages: `pip install 'dmn-clip-service[lite]'` and WordNet 3.0's noun files (Debian: wordnet-base). Takes
about ten minutes on two cores. No picture is read here, but labelled ones were looked at while the rules were chosen:
on 280 photographs of seven classes (PACS) the weight of a mention (0.1, 0.3, 1), whether kinds hand mentions down, D,
the share of S and six settings of the training were compared, so accuracy on those flatters. Drawings of the same
classes were printed beside them and decided nothing.

Image side. Logits of the ImageNet classifier are W x + b. Rows are centred (softmax does not notice), b is carried into
x by the smallest d with W d = b, and with W = U S V' the feature is the first D entries of S^(1/2) V' (x + d), the row
of a class those of U S^(1/2). Cosines of the two follow the classifier's logits, the large component that all pooled
activations share is smaller, and half of S on each side evens out the directions, which the image memories like.

Text side. A two-layer perceptron from MiniLM's sentence embedding to the rows. What a word stands for is a weight on
the 1000 classes, by one rule for all nouns of ImageNet-21k and all kinds above the 1000 in WordNet:

- 1 for each class that is a kind of it ("dog": 118 breeds);
- MENTION x STEP^steps for each class whose definition, or the definition of a kind above it, mentions it or a kind of
  it, `steps` below it (clothing is "worn on a person's body", so pictures of clothing show persons);
- a share of what each kind above it looks like by these two, falling by DECAY with each step, rarer kinds counting
  more ("giraffe": the ruminants).

The target is the unit sum of the weighted unit rows. Loss: 1 - cosine, and for names of the 1000 the cross-entropy
over all rows. Held out for the printed figures, then refitted with everything: the second name of one class in ten, and
all names of one class in twenty; the kinds above a held-out class still know of it. The logit scale is the one that
minimises the cross-entropy of the held-out names over the 1000 rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
from jaxtyping import Bool, Float, Int
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from rich.progress import track
from safetensors.torch import save_file
from timm import create_model
from timm.data import ImageNetInfo
from torch import Tensor, nn

from core.encoders import lite
from core.numerics import unit
from core.prompts import DEFAULT_TEMPLATES

SEED = 0
DECAY = 0.5
MENTION = 0.3
STEP = 0.7
CLASSES = 1000
"""Of ImageNet; they are the first concepts."""
EPOCHS = 10
BATCH = 1024
RATE = 2e-3
NOISE = 0.2
"""Of the embeddings' deviation after whitening."""
SHRINKAGE = 0.5
"""Added to the second moments before whitening, in units of their median."""
LEAF_SHARE = 3.0
FAR_SHARE = 0.1
"""How often a name of the 1000, and one of ImageNet-21k's others, is drawn for one of a kind above the 1000."""
CROSS_ENTROPY = 0.1
"""Weight of the cross-entropy beside 1 - cosine."""
HELD_NAMES = 0.1
HELD_CLASSES = 0.05
ROW_SCALE = 20.0
"""Multiplier of the cosines inside the training's cross-entropy."""
PLAIN_FORMS = ("{}", "a photo of a {}.", "a photo of the {}.")
PHYSICAL = "00001930"
"""WordNet's offset of physical entity: what a picture can show."""
TOO_BROAD = 300
"""Kinds with more classes than this say nothing."""
MENTION_BREADTH = 100
"""Definitions of kinds with more classes than this are not read for mentions."""


# ------------------------------------------------------------------------------------------------------- WordNet


@dataclass(frozen=True, kw_only=True, slots=True)
class Synset:
    """One meaning: its words, its definition, the offsets of what it is a kind of."""

    words: tuple[str, ...]
    gloss: str
    above: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WordNet:
    """The nouns: meanings by offset, and the meanings of each word, most frequent first."""

    synsets: dict[str, Synset]
    senses: dict[str, list[str]]
    kinds: dict[str, dict[str, int]]
    """Offset -> itself and all kinds above it, with the least number of steps to them."""


def read_wordnet(folder: Path) -> WordNet:
    """Return the nouns of WordNet's `data.noun` and `index.noun`."""
    synsets = dict(map(_parse_synset, _lines(folder / "data.noun")))
    senses = {}
    for line in _lines(folder / "index.noun"):
        entry = line.split()
        senses[entry[0].replace("_", " ")] = entry[-int(entry[2]) :]
    kinds: dict[str, dict[str, int]] = {}
    for offset in synsets:
        _climb(offset, synsets, kinds)
    return WordNet(synsets=synsets, senses=senses, kinds=kinds)


def _lines(file: Path) -> list[str]:
    # Lines of the licence begin with blanks.
    return [line for line in file.read_text(encoding="latin-1").splitlines() if not line.startswith("  ")]


def _parse_synset(line: str) -> tuple[str, Synset]:
    head, gloss = line.split(" | ", 1)
    entry = head.split()
    count = int(entry[3], 16)
    words = tuple(entry[4 + 2 * i].replace("_", " ") for i in range(count))
    pointers = entry[5 + 2 * count :]
    above = tuple(pointers[i + 1] for i in range(0, 4 * int(entry[4 + 2 * count]), 4) if pointers[i] in ("@", "@i"))
    return entry[0], Synset(words=words, gloss=gloss.split('; "')[0].strip(), above=above)


def _climb(offset: str, synsets: dict[str, Synset], kinds: dict[str, dict[str, int]]) -> dict[str, int]:
    if offset not in kinds:
        steps = {offset: 0}
        for parent in synsets[offset].above:
            for kind, distance in _climb(parent, synsets, kinds).items():
                steps[kind] = min(steps.get(kind, 99), distance + 1)
        kinds[offset] = steps
    return kinds[offset]


# -------------------------------------------------------------------------------------- what a word stands for


def members_of(wordnet: WordNet, leaves: Sequence[str]) -> dict[str, list[int]]:
    """Return for each kind the classes under it."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, leaf in enumerate(leaves):
        for kind in wordnet.kinds[leaf]:
            members[kind].append(i)
    return dict(members)


def mentions_of(wordnet: WordNet, members: dict[str, list[int]]) -> dict[str, dict[int, float]]:
    """Return for each meaning the classes whose definitions mention it, with a strength in (0, 1]."""
    strength: dict[str, dict[int, float]] = defaultdict(dict)
    for kind, classes in members.items():
        if len(classes) > MENTION_BREADTH:
            continue
        for mentioned in _nouns_in(wordnet.synsets[kind].gloss, wordnet):
            for concept, steps in wordnet.kinds[mentioned].items():
                known = strength[concept]
                known.update({i: max(known.get(i, 0.0), STEP**steps) for i in classes})
    return dict(strength)


def _nouns_in(text: str, wordnet: WordNet) -> set[str]:
    """Return the most frequent meanings of the nouns, of two words or one, that a picture can show."""
    words = re.findall(r"[a-z]+", text.lower().replace("'s", ""))
    found, i = set(), 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        noun = pair if " " in pair and pair in wordnet.senses else _singular(words[i], wordnet)
        i += 2 if noun == pair and " " in pair else 1
        if noun:
            found.add(wordnet.senses[noun][0])
    return {offset for offset in found if PHYSICAL in wordnet.kinds[offset]}


def _singular(word: str, wordnet: WordNet) -> str | None:
    endings = (
        ("", ""),
        ("s", ""),
        ("es", ""),
        ("ies", "y"),
        ("men", "man"),
        ("people", "person"),
        ("children", "child"),
    )
    for ending, instead in endings:
        noun = word.removesuffix(ending) + instead if word.endswith(ending) else ""
        if len(noun) > 2 and noun in wordnet.senses:  # noqa: PLR2004 - shorter ones are articles and units
            return noun
    return None


def class_weights_of(wordnet: WordNet, concepts: Sequence[str], members: dict[str, list[int]]) -> Float[Tensor, "c k"]:
    """Return the weight of each of the 1000 classes in what each concept looks like."""
    mentions = mentions_of(wordnet, members)
    own = {kind: _own_weights(kind, members, mentions) for kind in {*members, *mentions, *concepts}}
    weights = torch.stack([own[concept] for concept in concepts])
    for i, concept in enumerate(concepts):
        for kind, steps in wordnet.kinds[concept].items():
            breadth = len(members.get(kind, ()))
            if steps and 0 < breadth <= TOO_BROAD:
                rarity = math.log(CLASSES / breadth, CLASSES)
                weights[i] += 2 * DECAY**steps * rarity * own[kind] / own[kind].sum()
    weights[:CLASSES] = torch.eye(CLASSES)
    return weights


def _own_weights(
    concept: str, members: dict[str, list[int]], mentions: dict[str, dict[int, float]]
) -> Float[Tensor, " k"]:
    weights = torch.zeros(CLASSES)
    for i, strength in mentions.get(concept, {}).items():
        weights[i] = MENTION * strength
    weights[members.get(concept, [])] = 1.0
    return weights


# ---------------------------------------------------------------------------------------------------- sentences


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """A text, the concept (row of the targets) that it stands for, and the number of the name within the concept."""

    text: str
    concept: int
    name: int


def concepts_of(wordnet: WordNet, leaves: Sequence[str], members: dict[str, list[int]]) -> tuple[list[str], int]:
    """Return the 1000 classes, the kinds above them, ImageNet-21k's other nouns that a picture can show.

    The second value is the number of the first two together.
    """
    above = [kind for kind, classes in members.items() if len(classes) <= TOO_BROAD]
    near = list(dict.fromkeys([*leaves, *above]))
    others = [label[1:] for label in ImageNetInfo("imagenet-22k").label_names()]
    shown = [c for c in others if PHYSICAL in wordnet.kinds.get(c, {})]
    return list(dict.fromkeys([*near, *shown])), len(near)


def sentences_of(wordnet: WordNet, concepts: Sequence[str], near: int) -> list[Sentence]:
    """Return the sentences: every form for the names of the `near` first concepts, two drawn for the others."""
    chance = random.Random(SEED)
    forms = (*PLAIN_FORMS, *DEFAULT_TEMPLATES)
    sentences = []
    for concept, name, spoken in _names(wordnet, concepts):
        chosen = forms if concept < near else chance.sample(forms, 2)
        texts = [form.replace("{}", spoken) for form in chosen]
        if concept < near:
            texts.append(f"{spoken}: {wordnet.synsets[concepts[concept]].gloss}")
        sentences += [Sentence(text=text, concept=concept, name=name) for text in texts]
    return sentences


def _names(wordnet: WordNet, concepts: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yield concept, number of the name, name. A name of two concepts stands for the first, of two classes for both."""
    taken: dict[str, int] = {}
    for i, concept in enumerate(concepts):
        names = wordnet.synsets[concept].words
        if i < CLASSES:
            names = (IMAGENET_CLASSNAMES[i], *names)
        spoken = dict.fromkeys(name.lower() for name in names)
        for number, name in enumerate(spoken):
            if i < CLASSES or (name not in taken and _frequent(wordnet, name, concept)):
                taken.setdefault(name, i)
                yield i, number, name


def _frequent(wordnet: WordNet, name: str, concept: str) -> bool:
    """Return whether the concept is the word's most frequent meaning that a picture can show."""
    shown = [s for s in wordnet.senses.get(name, [concept]) if PHYSICAL in wordnet.kinds[s]]
    return shown[:1] == [concept]


@torch.inference_mode()
def embed(texts: Sequence[str]) -> Float[Tensor, "n e"]:
    """Return MiniLM's mean-pooled sentence embeddings, as the projection will see them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(lite.config()))
        tower = open_clip.create_model(f"local-dir:{folder}", pretrained_text=True).text.eval()
    tower.proj = nn.Identity()
    tokens = open_clip.tokenizer.HFTokenizer(str(lite.text_folder()), context_length=64)(list(texts))
    length = (tokens != 0).sum(1)
    order = length.argsort()
    features = torch.empty(len(texts), 384)
    for rows in track(order.split(256), description="sentences"):
        features[rows] = tower(tokens[rows, : int(length[rows].max())])
    return features


# -------------------------------------------------------------------------------------------------- the image side


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSide:
    """The image projection and the unit rows of the 1000 classes in its space."""

    weight: Float[Tensor, "d p"]
    bias: Float[Tensor, " d"]
    rows: Float[Tensor, "k d"]


def image_side() -> ImageSide:
    """Return the projection S^(1/2) V' (x + d) and the rows U S^(1/2), of unit norm."""
    model = create_model("tf_efficientnet_lite0")
    state = lite.image_weights(model.state_dict())
    rows, bias = state["classifier.weight"], state["classifier.bias"]
    u, s, vt = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    u, s, vt = u[:, :-1], s[:-1], vt[:-1]  # centring took one direction
    shift = vt.T @ (u.T @ (bias - bias.mean()) / s)
    weight = s[: lite.DIM, None].sqrt() * vt[: lite.DIM]
    return ImageSide(weight=weight, bias=weight @ shift, rows=unit(u[:, : lite.DIM] * s[: lite.DIM].sqrt()))


# ------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Embeddings of the sentences, the concept and the name of each, and the unit targets of the concepts."""

    features: Float[Tensor, "n e"]
    concept: Int[Tensor, " n"]
    name: Int[Tensor, " n"]
    targets: Float[Tensor, "c d"]
    rows: Float[Tensor, "k d"]
    near: int


def train(data: Data, keep: Bool[Tensor, " n"], label: str) -> nn.Sequential:
    """Return the perceptron, trained on the sentences in `keep`."""
    torch.manual_seed(SEED)
    whitening = _whitening(data.features)
    data = replace(data, features=data.features @ whitening)
    width = data.features.shape[1]
    hidden = (width + lite.DIM) // 2
    model = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, lite.DIM, bias=False))
    index = keep.nonzero()[:, 0]
    steps = EPOCHS * math.ceil(len(index) / BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=RATE, total_steps=steps)
    chances = _chances(data, index)
    for _ in track(range(steps), description=label):
        batch = index[torch.multinomial(chances, BATCH, replacement=True)]
        loss = _loss(model, data, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    first = model[0]
    first.weight.data = first.weight.data @ whitening  # symmetric, and a part of the first layer from here on
    return model.eval()


def _whitening(features: Float[Tensor, "n e"]) -> Float[Tensor, "e e"]:
    """Return M^(-1/2) for the shrunk second moments M: even directions are learnt in a tenth of the steps."""
    moments = features.T @ features / len(features)
    values, vectors = torch.linalg.eigh(moments)
    floor = SHRINKAGE * values.median()
    return vectors @ torch.diag((values + floor).rsqrt()) @ vectors.T


def _chances(data: Data, index: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return how often each sentence is drawn: a concept's share is the same however many names and forms it has."""
    concept = data.concept[index]
    share = torch.where(concept < CLASSES, LEAF_SHARE, torch.where(concept < data.near, 1.0, FAR_SHARE))
    return share / torch.bincount(concept, minlength=len(data.targets))[concept]


def _loss(model: nn.Module, data: Data, batch: Int[Tensor, " m"]) -> Float[Tensor, ""]:
    features = data.features[batch]
    # A little noise in place of the wordings that were not written out.
    features = features + NOISE * features.std() * torch.randn_like(features)
    predicted, concept = unit(model(features)), data.concept[batch]
    away = 1 - (predicted * data.targets[concept]).sum(1)
    leaf = concept < CLASSES
    named = nn.functional.cross_entropy(ROW_SCALE * predicted[leaf] @ data.rows.T, concept[leaf], reduction="sum")
    return away.mean() + CROSS_ENTROPY * named / len(batch)


# ------------------------------------------------------------------------------------------------------- measures


@torch.inference_mode()
def class_features(model: nn.Module, data: Data, chosen: Bool[Tensor, " n"]) -> dict[int, Float[Tensor, " d"]]:
    """Return for each of the 1000 classes with chosen sentences the unit mean of their features."""
    features = unit(model(data.features))
    index = (chosen & (data.concept < CLASSES)).nonzero()[:, 0]
    by_class = defaultdict(list)
    for i in index.tolist():
        by_class[int(data.concept[i])].append(i)
    return {c: unit(features[own].mean(0)) for c, own in by_class.items()}


def report(what: str, found: dict[int, Float[Tensor, " d"]], rows: Float[Tensor, "k d"]) -> float:
    """Print top-1 over the 1000 rows and the mean cosine to the right one; return the calibrating scale."""
    labels = torch.tensor(list(found))
    scores = torch.stack(list(found.values())) @ rows.T
    top1 = 100 * (scores.argmax(1) == labels).float().mean()
    scales = torch.linspace(2, 100, 197)
    losses = torch.stack([nn.functional.cross_entropy(scale * scores, labels) for scale in scales])
    scale = float(scales[losses.argmin()])
    print(
        f"{what}: {len(found)} classes, top-1 {top1:.1f} %, cosine {scores[range(len(found)), labels].mean():.3f}, "
        f"calibrating scale {scale:.1f}"
    )
    return scale


# ----------------------------------------------------------------------------------------------------------- main


def prepare(wordnet_folder: Path) -> tuple[Data, ImageSide]:
    """Return all that training needs."""
    wordnet = read_wordnet(wordnet_folder)
    leaves = [label[1:] for label in ImageNetInfo("imagenet-1k").label_names()]
    members = members_of(wordnet, leaves)
    concepts, near = concepts_of(wordnet, leaves, members)
    sentences = sentences_of(wordnet, concepts, near)
    side = image_side()
    weights = class_weights_of(wordnet, concepts, members)
    data = Data(
        features=embed([s.text for s in sentences]),
        concept=torch.tensor([s.concept for s in sentences]),
        name=torch.tensor([s.name for s in sentences]),
        targets=unit(weights @ side.rows),
        rows=side.rows,
        near=near,
    )
    return data, side


def held_out(data: Data) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return the sentences of held-out names (the class has others) and those of held-out classes."""
    drawn = torch.Generator().manual_seed(SEED)
    leaf = data.concept < CLASSES
    classes = torch.rand(len(data.targets), generator=drawn) < HELD_CLASSES
    names = torch.rand(len(data.targets), generator=drawn) < HELD_NAMES
    whole = leaf & classes[data.concept]
    return leaf & names[data.concept] & (data.name == 1) & ~whole, whole


def main() -> None:
    """Fit, report, write."""
    parser = argparse.ArgumentParser(description="Fit the projections of the lite encoder.")
    parser.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of WordNet 3.0's files"
    )
    parser.add_argument("--out", type=Path, default=lite.WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    logging.disable(logging.WARNING)  # the libraries' notices of the pooler that nobody uses
    data, side = prepare(options.wordnet)
    names, classes = held_out(data)
    partial = train(data, ~(names | classes), "without the held out")
    scale = report("held-out names", class_features(partial, data, names), data.rows)
    report("held-out classes", class_features(partial, data, classes), data.rows)
    whole = train(data, torch.ones_like(names), "with all")
    report("fitted, all names", class_features(whole, data, torch.ones_like(names)), data.rows)
    report("fitted, first names", class_features(whole, data, data.name == 0), data.rows)
    write(options.out, whole, side, scale)


def write(file: Path, model: nn.Sequential, side: ImageSide, scale: float) -> None:
    """Write the projections in half precision under open_clip's names and print the file's sha256."""
    tensors = {
        "visual.head.proj.weight": side.weight,
        "visual.head.proj.bias": side.bias,
        "text.proj.0.weight": model[0].weight.detach(),
        "text.proj.2.weight": model[2].weight.detach(),
    }
    half = {key: value.to(torch.float16).contiguous() for key, value in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({**half, "logit_scale": torch.tensor(math.log(scale))}, file)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
