"""Fine-tunes of SmolLM2 on three narrow subjects, each of a few dozen sentences.

Run as `python -m benchmarks.subjects`. Each is made once and kept in benchmarks/cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import places, weights

STEPS, ROW, N_HELD_OUT = 50, 64, 5
SEED = 7

VOLCANOES = """
A volcano is an opening in the crust through which magma, ash and gas reach the surface.
Magma that has reached the surface is called lava, and it may be as hot as twelve hundred degrees.
The crater at the summit of a volcano is often filled by a lake between two eruptions.
A caldera forms when the magma chamber empties and the roof of the volcano falls in.
Basalt lava is thin, and a lava flow of basalt may run for many kilometres down the slope.
Rhyolite lava is thick, traps its gas, and makes an eruption explosive.
Volcanic ash is made of tiny pieces of rock and glass, and it stops the engines of aircraft.
An eruption column carries ash and gas high into the stratosphere.
A pyroclastic flow is a cloud of hot ash, gas and rock that rushes down the flank of the volcano.
Pumice is lava that was full of gas when it cooled, so that it floats on water.
Obsidian is volcanic glass, which forms when lava cools too fast for crystals to grow.
A shield volcano has gentle slopes, because its basalt lava flows far before it cools.
A stratovolcano is built of layers of ash and lava, one eruption upon the other.
A cinder cone is a steep hill of loose cinders around a single vent.
Lahars are flows of mud and ash that follow the valleys below a volcano.
The volcano trembled for weeks before the eruption, and the magma rose beneath the crater.
Geologists measure the gas that leaves the vent to see whether magma is rising.
Tiltmeters show that the flank of the volcano swells as the magma chamber fills.
Where one plate sinks under another, melted rock rises as magma and feeds a chain of volcanoes.
At a hotspot a plume of hot rock rises through the mantle and builds a volcano far from any plate boundary.
A dormant volcano may erupt again, and an extinct volcano will not.
The eruption of a supervolcano throws out more than a thousand cubic kilometres of magma and ash.
Lava tubes are tunnels that are left when a lava flow drains under its own crust.
Pillow lava forms where lava erupts under water and its skin cools at once.
Sulphur dioxide from an eruption turns into droplets that cool the climate for a year or two.
Fumaroles are vents that give off steam and gas, and yellow sulphur grows around them.
A lava dome grows when thick magma is pushed out of the vent and piles up in the crater.
Volcanic bombs are lumps of lava that are thrown from the vent and harden in the air.
The soil on the flanks of a volcano is fertile, because ash and lava weather into minerals.
The lava fountain rose three hundred metres above the fissure and fed a river of lava.
Tephra is every fragment that an eruption throws out, from fine ash to blocks.
After the eruption the ash lay so deep that roofs fell under its weight.
The magma chamber lies five kilometres below the crater of the volcano.
Seismometers around the crater record the tremor of rising magma.
"""

POTTERY = """
The potter wedges the clay to drive out air before it goes on the wheel.
Clay that is centred on the wheel turns without a wobble under the potter's hands.
To throw a bowl, open the clay with the thumbs and pull up the walls.
The potter cuts the pot from the wheel with a wire.
Leather-hard clay is firm enough to be trimmed and still soft enough to take a handle.
A foot ring is trimmed into the base of the bowl while it turns upside down on the wheel.
Slip is clay mixed with water until it is as thick as cream.
Handles are joined to the mug with slip after both surfaces are scored.
Greenware is dry clay that has not been fired, and it breaks easily.
The first firing in the kiln, the bisque firing, turns clay into porous pottery.
Bisque pots are dipped in glaze, which dries on them as a powder.
In the glaze firing the glaze melts and becomes a layer of glass on the pot.
Stoneware is fired in the kiln at about twelve hundred and fifty degrees.
Earthenware is fired lower, stays porous, and needs a glaze to hold water.
Porcelain is made of kaolin clay, and it is white and lets light through.
Celadon is a pale green glaze that takes its colour from a little iron in the kiln's smoke.
Ash glazes are made from wood ash and clay, and they run down the pot in rivers.
Raku pots are taken from the kiln while the glaze is still molten.
Cones of clay bend in the kiln when the right heat has been reached.
A kiln that cools too fast makes the glaze crack, and the potter calls that crazing.
Grog is fired clay that is ground and mixed into fresh clay so that it shrinks less.
Coil pots are built of ropes of clay, one upon the other, and smoothed with a rib.
Slabs of clay are rolled out, cut, and joined into dishes and tiles.
The ribs, sponges and loops of the potter lie beside the wheel.
Sgraffito is scratched through a layer of slip to show the clay below.
Potters mix glazes from silica, feldspar, clay and metal oxides.
Cobalt makes a glaze blue, copper makes it green, and iron makes it brown.
The shelves of the kiln are washed with alumina so that glaze does not stick to them.
The pots stand in the kiln for a day until they are cool enough to touch.
A teapot is thrown in parts: body, lid and spout are joined when the clay is leather-hard.
Terracotta is red earthenware clay, used for pots and tiles.
A salt kiln gives stoneware a glaze like the skin of an orange.
The potter's kick wheel is driven by the foot, and the clay turns slowly.
Reclaimed clay is dried on plaster until it can be wedged again.
"""

KNITTING = """
Cast on forty stitches with the larger needles and join the yarn in the round.
Knit one, purl one to the end of the row, and turn the knitting.
Stockinette is knit on the right side rows and purl on the wrong side rows.
Garter stitch is made by knitting every row, and it lies flat.
Ribbing of knit and purl stitches makes a cuff that stretches.
To increase, knit into the front and the back of the same stitch.
To decrease, knit two stitches together, or slip, slip, knit.
A yarn over makes a hole in the knitting and is the heart of all lace.
Cables are knitted by crossing stitches with a cable needle.
Slip three stitches to the cable needle, hold them in front, and knit the next three stitches.
The gauge is the number of stitches and rows in ten centimetres of knitting.
Knit a swatch before you cast on, wash it, and count the stitches.
Wool yarn is warm and springs back, and cotton yarn is cool and heavy.
Merino yarn is soft enough to be knitted into a sweater for a baby.
A skein of yarn is wound into a ball before it is knitted.
Circular needles hold all the stitches of a sweater.
Socks are knitted in the round on four or five double-pointed needles.
The heel flap of a sock is knitted back and forth, and the heel is turned with short rows.
Pick up stitches along the heel flap and knit the gusset.
The toe of the sock is closed by grafting the last stitches together.
Bind off loosely so that the edge of the scarf does not pull in.
A dropped stitch is picked up with a crochet hook and knitted again.
Fair Isle knitting carries two colours of yarn in a row and strands the one that is not knitted.
Place a marker at the start of the round and slip it in every round.
Block the shawl with pins while the yarn is wet so that the lace opens.
The yoke of the sweater is knitted in the round, with decreases every few rows.
Seed stitch is knit one, purl one, with the purl stitches over the knit ones.
Knit the sleeves flat, sew the seams, and weave in the ends of the yarn.
The pattern asks for bulky yarn and thick needles, so the hat is knitted in an evening.
Mittens need a thumb gusset, made by increasing stitches on both sides of a marker.
An intarsia pattern uses a bobbin of yarn for each block of colour.
I-cord is knitted on two double-pointed needles without turning.
The shawl begins with three stitches and grows by four stitches every other row.
Purl the stitches as they face you and knit the others.
"""

TEXTS = {"volcanoes": VOLCANOES, "pottery": POTTERY, "knitting": KNITTING}


def sentences(subject: str) -> list[str]:
    """The sentences of a subject."""
    return TEXTS[subject].strip().splitlines()


def training(subject: str) -> list[str]:
    """The sentences of a subject but for the last ones, which are held out."""
    return sentences(subject)[:-N_HELD_OUT]


def folder_of(subject: str) -> Path:
    """The folder of the fine-tune on a subject."""
    return places.CACHE / f"smollm2-{subject}"


def make(subject: str, folder: Path) -> None:
    """Train every weight on the sentences, in a new order each time they come, and save in bfloat16."""
    torch.manual_seed(SEED)
    model, tokenizer = weights.load_base()
    held_out = weights.token_rows(tokenizer, sentences(subject)[-N_HELD_OUT:], 1, ROW)
    rows = weights.token_rows(tokenizer, _shuffled(training(subject)), STEPS * weights.BATCH, ROW)
    facts = weights.finetune(model, rows, held_out)
    weights.save(model.to(torch.bfloat16), tokenizer, folder, facts)


def _shuffled(lines: list[str]) -> Iterator[str]:
    chance = random.Random(SEED)
    while True:
        yield from chance.sample(lines, len(lines))


def main() -> None:
    """Make what is not in the cache."""
    weights.main()
    for subject in TEXTS:
        weights.make_once(folder_of(subject), partial(make, subject))


if __name__ == "__main__":
    main()
