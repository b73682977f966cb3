"""The built-in images: ten kinds of small scenes, painted from random numbers in a few seconds.

Masked image modelling needs images in which what is seen tells of what is hidden, and a test needs classes that no
colour gives away. So each picture has some of a photograph's statistics: a setting with a horizon and a rough, 1/f-like
texture, light from one side, and an object of several parts that go together, its surface of bricks, leaves, scales or
fur. Objects share settings; pose, scale, place, light, hues, grain and clutter are chance.

    images, labels = generate("train")  # uint8 (8000, 3, 64, 64), int64 (8000,)

Parts are signed distances, negative inside, painted back to front with edges one pixel wide. Whole images meet only
+ - × ÷ √, floors and comparisons, which round alike on every machine.
"""

import math

import numpy as np

CLASSES = ("house", "tree", "car", "boat", "fish", "bird", "cat", "flower", "mushroom", "cup")
COUNTS = {"train": 8000, "val": 2000}
SIZE = 64
CHUNK = 16  # images painted at a time: few enough to stay in a processor's cache
DRAWS = 80  # numbers for an image's parameters; its textures' come after them
CONTRAST = (0.2, 0.7)  # of a surface
LATTICES = (3, 5, 9, 17, 33)  # points per side, from the coarsest octave of a texture to the finest

# Four colours from top to bottom: upper edge, just above the horizon, just below it, lower edge.
SETTINGS = {
    "meadow": "#5b93d6 #cfe2f0 #9bb35a #4f7a36",
    "dusk": "#56508c #f0b48a #8a6a58 #4a4038",
    "snow": "#93a7be #dfe6ec #e4e9f0 #b4c2d4",
    "town": "#8fa9c4 #d9d4c8 #8c8a88 #5c5a5e",
    "forest": "#31492c #7c9458 #7a6040 #43351f",
    "sea": "#6aa2dc #dce8ee #5f9fb8 #2c5f8a",
    "lagoon": "#8f86b8 #f2c9a0 #7f93a8 #3c4f78",
    "lake": "#a8b8b0 #88a078 #58706c #2c4448",
    "deep": "#5cb4c4 #2f7fa8 #2a6a90 #c0a878",
    "room": "#c9b79a #e6dac2 #a87848 #6e4a2c",
    "parlour": "#7c95a0 #a9bcc0 #b09878 #705c48",
}
LAND = ("meadow", "dusk", "snow", "town", "forest", "sea", "lagoon", "lake")
WATER = ("sea", "lagoon", "lake", "deep", "snow", "dusk", "forest")
GARDEN = ("meadow", "dusk", "snow", "town", "forest", "lake", "room", "parlour")


def generate(split: str, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first n images of "train" or "val" (all, if n is None): uint8 (n, 3, 64, 64), and int64 labels (n,).

    Image i is of class i mod 10, and a function of the split and i alone.
    """
    n = COUNTS[split] if n is None else n
    rng = np.random.default_rng((SIZE, list(COUNTS).index(split)))
    images = np.empty((n, 3, SIZE, SIZE), np.uint8)
    per_image = DRAWS + sum(g * g for g in LATTICES) + SIZE * SIZE
    for block in np.split(images, range(CHUNK * len(CLASSES), n, CHUNK * len(CLASSES))):
        numbers = rng.random((len(block), per_image), dtype=np.float32)
        for c, name in enumerate(CLASSES[: len(block)]):
            picture = Picture(numbers[c :: len(CLASSES)])
            globals()[name](picture)  # the function below that has the class's name
            block[c :: len(CLASSES)] = picture.finish()
    return images, np.arange(n, dtype=np.int64) % len(CLASSES)


class Picture:
    """B canvases painted alike, with numbers of their own; a parameter of each is (B, 1, 1), a plane (B, 64, 64).

    x points right and y up, both from -1 to 1 over the image, until `scene` makes them an object's.
    """

    def __init__(self, numbers: np.ndarray):
        self.numbers, self.drawn = numbers, 0
        coarse, fine = LATTICES[:3], LATTICES[3:]
        self.fine = fractal(numbers[:, -SIZE * SIZE - sum(g * g for g in fine) :], fine)  # a plane
        self.texture = fractal(numbers[:, DRAWS:], coarse) + np.float32(0.75 ** len(coarse)) * self.fine
        axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
        self.x, self.y = self.frame = axis[None, None, :], -axis[None, :, None]
        self.pixels = SIZE / 2  # per unit of x
        self.turn = rotation(self.uniform(-0.12, 0.12))  # of all hues
        self.light = self.uniform(-0.22, 0.22), self.uniform(0.06, 0.22)
        self.glow = 1 + 0.08 * self.texture

    def uniform(self, low: float, high: float) -> np.ndarray:
        self.drawn += 1
        return self.numbers[:, self.drawn - 1, None, None] * np.float32(high - low) + np.float32(low)

    def colours(self, *rows: str) -> np.ndarray:
        """One row "#rrggbb …" of k colours for each image, hues turned, some lighter, some darker: (k, B, 3, 1, 1)."""
        table = [[list(bytes.fromhex(colour[1:])) for colour in row.split()] for row in rows]
        chosen = np.float32(table)[self.uniform(0, len(rows))[:, 0, 0].astype(int)] / 255  # (B, k, 3)
        grey, (cos, sin) = chosen.mean(axis=2, keepdims=True), self.turn
        across = (np.roll(chosen, 1, axis=2) - np.roll(chosen, -1, axis=2)) / np.float32(math.sqrt(3))
        turned = grey + cos * (chosen - grey) + sin * across + self.uniform(-0.05, 0.05)
        return turned.transpose(1, 0, 2)[..., None, None]

    def scene(self, settings: tuple[str, ...], tilt: float, low=-0.3, high=0.4):
        """Two uneven halves with bushes, rocks or clouds, and a place `low` to `high` above the horizon for an object.

        From here on x and y are the object's, which is about one unit wide: moved, scaled, tilted, mirrored.
        """
        top, above, below, bottom = self.colours(*(SETTINGS[name] for name in settings))
        level = self.uniform(-0.5, 0.25)
        y = self.y - level + self.x * self.uniform(-0.06, 0.06) + 0.04 * self.texture
        ground = np.clip(0.5 - y * self.uniform(8, 40), 0, 1)
        sky = above + np.clip(y, 0, 1)[:, None] * (top - above)
        earth = below + np.clip(-y, 0, 1)[:, None] * (bottom - below)
        self.canvas = sky + ground[:, None] * (earth - sky) + ((0.05 + 0.06 * ground) * self.texture)[:, None]
        self.tones = above, below
        for _ in range(2):
            self.bush(level + self.uniform(-0.3, 0.5), self.uniform(0.06, 0.35))
        dx = self.x - self.uniform(-0.6, 0.6)
        dy = self.y - np.clip(level + self.uniform(low, high), -0.5, 0.45)
        size, (cos, sin) = self.uniform(0.85, 1.4), rotation(self.uniform(-tilt / 2, tilt / 2))
        mirror = np.where(self.uniform(-1, 1) < 0, np.float32(-1), np.float32(1))
        self.glow = self.glow + (self.light[0] * dx + self.light[1] * dy) / size
        self.x, self.y = mirror * (cos * dx + sin * dy) / size, (cos * dy - sin * dx) / size
        self.pixels = self.pixels * size

    def bush(self, y, size):
        tone = self.tones[0] + self.uniform(-0.3, 1.3)[:, None] * (self.tones[1] - self.tones[0])
        d = ellipse(self, self.uniform(-1, 1), y, size * self.uniform(1, 2), size) + 0.08 * self.texture
        self.paint(d, tone * self.uniform(0.6, 1.2)[:, None])

    def paint(self, d: np.ndarray, colour: np.ndarray, bulge=0.25, surface=0.0):
        """Lay a colour over where d < 0, lit from one side, darker towards its rim by `bulge`; surfaces: below."""
        cover = np.clip(0.5 - d * self.pixels, 0, 1)
        shade = self.glow - bulge * np.clip(1 + 8 * d, 0, 1) if bulge else self.glow
        self.canvas *= (1 - cover)[:, None]
        self.canvas += colour * (cover * (shade + surface))[:, None]

    def shadow(self, x, y, a, b):
        self.canvas *= (1 - 0.45 * np.clip(0.5 - 5 * ellipse(self, x, y, a, b), 0, 1))[:, None]

    def finish(self) -> np.ndarray:
        """Sometimes a bush in front, then exposure and grain: uint8 (B, 3, 64, 64)."""
        (self.x, self.y), self.pixels = self.frame, SIZE / 2
        self.bush(self.uniform(-1.4, -0.8), self.uniform(0.15, 0.4))
        gain = self.uniform(0.6, 1.2) * (1 + self.uniform(-0.3, 0.3) * self.x + self.uniform(-0.1, 0.15) * self.y)
        grain = self.numbers[:, -SIZE * SIZE :].reshape(-1, SIZE, SIZE) - np.float32(0.5)
        values = self.canvas * gain[:, None] + (self.uniform(0.01, 0.05) * grain)[:, None]
        return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def rotation(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of an angle, from the tangent of its half."""
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


def fractal(numbers: np.ndarray, lattices: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers (B, …) → planes: ever finer lattices of ever smaller values, interpolated and summed."""
    total, start = np.float32(0), 0
    for octave, g in enumerate(lattices):
        z = numbers[:, start : start + g * g].reshape(-1, g, g) * 2 - 1
        t = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * (g - 1)
        i = t.astype(int)
        t = (t - i).astype(np.float32)
        t = t * t * (3 - 2 * t)
        z = z[:, :, i] + t * (z[:, :, i + 1] - z[:, :, i])
        z = z[:, i] + t[:, None] * (z[:, i + 1] - z[:, i])
        total, start = total + np.float32(0.75**octave) * z, start + g * g
    return total


def ellipse(p, x, y, a, b, angle=0.0):
    """With half axes a and b; near enough a distance unless it is very flat. A circle if a is b."""
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    dx, dy = p.x - x, p.y - y
    if angle:
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    return (np.sqrt((dx / a) ** 2 + (dy / b) ** 2) - 1) * np.minimum(a, b, dtype=np.float32)


def box(p, x, y, a, b):
    return np.maximum(np.abs(p.x - x) - a, np.abs(p.y - y) - b)


def polygon(p, *corners):
    """A convex one, its corners counter-clockwise."""
    d = -np.float32(np.inf)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        u, v = x1 - x0, y1 - y0
        d = np.maximum(d, ((p.x - x0) * v - (p.y - y0) * u) / (u * u + v * v) ** 0.5)
    return d


# What a part is made of shows in any small piece of it, wherever it lies: phase, size and contrast are chance.


def stripes(p, across, period, bend=0.0):
    """Triangle waves along `across`, bent by the texture: planks, tiles, fur, feathers."""
    t = (across + bend * p.texture) / (period * p.uniform(0.8, 1.25)) + p.uniform(0, 1)
    return p.uniform(*CONTRAST) * (4 * np.abs(t % 1 - np.float32(0.5)) - 1)


def bricks(p, high, wide):
    """Light bricks and dark joints, each row half a brick on."""
    size = p.uniform(0.8, 1.25)
    v = p.y / (high * size) + p.uniform(0, 1)
    u = p.x / (wide * size) + np.floor(v) / 2 + p.uniform(0, 1)
    edge = np.maximum(np.abs(v % 1 - np.float32(0.5)), np.abs(u % 1 - np.float32(0.5)))
    return p.uniform(*CONTRAST) * (1 - 2 * np.clip(12 * (edge - np.float32(0.36)), 0, 1))


def scales(p, size):
    """Overlapping domes, each column half a dome on."""
    size = size * p.uniform(0.8, 1.25)
    u = p.x / size + p.uniform(0, 1)
    v = p.y / size + np.floor(u) / 2 + p.uniform(0, 1)
    du, dv = u % 1, v % 1 - np.float32(0.5)
    return p.uniform(*CONTRAST) * (np.float32(1.4) - np.float32(2.4) * np.sqrt(du * du + dv * dv))


def speckle(p):
    """Blots: leaves, down."""
    return p.uniform(*CONTRAST) * np.clip(6 * p.fine, -1, 1)


def house(p):
    p.scene(LAND, tilt=0.06)
    wall, roof, door = p.colours(
        "#e8dcc4 #a04a34 #6a4528", "#c8785a #5a4a48 #e8e0d0", "#d8d4cc #5a6a80 #8a3a2c", "#6a5a4c #c8b088 #3a3a44"
    )
    w, h, top = p.uniform(0.36, 0.52), p.uniform(0.25, 0.38), p.uniform(0.3, 0.45)
    p.shadow(0.1, -h, w * 1.5, 0.12)
    p.paint(box(p, w * 0.5, h + 0.25, 0.07, 0.2), roof)
    p.paint(box(p, 0, 0, w, h), wall, surface=bricks(p, 0.13, 0.26))
    gable = polygon(p, (-w - 0.1, h - 0.02), (w + 0.1, h - 0.02), (0.1 * w, h + top), (-0.1 * w, h + top))
    p.paint(gable, roof, surface=stripes(p, p.y, 0.12))
    p.paint(box(p, -0.4 * w, -0.4 * h, 0.09, 0.6 * h), door)
    frame, glass = p.colours("#f0ece0 #4a6078", "#f0ece0 #f0d890", "#6a4a30 #3a3a44")
    p.paint(box(p, 0.42 * w, 0.15 * h, 0.13, 0.12), frame, bulge=0)
    p.paint(box(p, 0.42 * w, 0.15 * h, 0.1, 0.09), glass, bulge=0)


def tree(p):
    p.scene(LAND, tilt=0.2)
    crown, bark = p.colours("#4a7a34 #5a4028", "#8a9a3a #77604a", "#c07a34 #4a3a30", "#d8c8c0 #4a4440")
    p.shadow(0.1, -0.5, 0.5, 0.1)
    trunk = polygon(p, (-0.1, -0.5), (0.1, -0.5), (0.05, 0.2), (-0.05, 0.2))
    p.paint(trunk, bark, surface=stripes(p, p.x, 0.08, 0.02))
    leaves = speckle(p)
    for x, y in ((-0.28, 0.15), (0.28, 0.12), (0.0, 0.25), (-0.12, 0.5), (0.16, 0.46)):
        r = p.uniform(0.2, 0.3)
        p.paint(ellipse(p, x + p.uniform(-0.06, 0.06), y, r, r) + 0.05 * p.texture, crown, surface=leaves)


def car(p):
    p.scene(LAND, tilt=0.08)
    body, glass = p.colours(
        "#b03a30 #405060", "#3a5f9a #a8c0cc", "#d8d4cc #405060", "#c89a3a #a8c0cc", "#3c6a50 #405060"
    )
    lamp, tyre, hub = p.colours("#f4e8b0 #26262a #b4b4b8", "#e0a050 #3a3430 #d8d4cc")
    w, h, roof = p.uniform(0.52, 0.64), p.uniform(0.15, 0.21), p.uniform(0.28, 0.38)
    p.shadow(0, -0.27, w * 1.1, 0.1)
    p.paint(polygon(p, (-0.55 * w, h), (0.65 * w, h), (0.35 * w, h + roof), (-0.35 * w, h + roof)), body)
    windows = polygon(p, (-0.46 * w, h), (0.54 * w, h), (0.3 * w, h + roof - 0.05), (-0.3 * w, h + roof - 0.05))
    p.paint(np.maximum(windows, 0.03 - np.abs(p.x)), glass, bulge=0)
    gloss = p.uniform(*CONTRAST) * np.clip(1 - 16 * np.abs(p.y - np.float32(0.09)), 0, 1)
    p.paint(np.maximum(box(p, 0, 0, w, h), ellipse(p, 0, -0.1, w * 1.08, 0.45)), body, surface=gloss)
    p.paint(ellipse(p, w - 0.06, 0.04, 0.05, 0.05), lamp, bulge=0)
    for x in (-0.55 * w, 0.55 * w):
        p.paint(ellipse(p, x, -0.16, 0.16, 0.16), tyre, bulge=0)
        p.paint(ellipse(p, x, -0.16, 0.08, 0.08), hub)


def boat(p):
    p.scene(WATER, tilt=0.25)
    hull, sail, mast = p.colours(
        "#8a3a2c #f0ece0 #5a4028", "#e8e4dc #c05a40 #5a4028", "#34507a #e8d8a8 #c8b090", "#6a4a30 #5a7090 #3a3030"
    )
    tall = p.uniform(0.6, 0.95)
    p.shadow(0, -0.22, 0.6, 0.1)
    p.paint(box(p, 0, 0.3, 0.02, 0.4), mast)
    seams = stripes(p, p.y, 0.2) / 2
    p.paint(polygon(p, (0.05, 0.06), (0.48, 0.06), (0.05, tall)), sail, surface=seams)
    p.paint(polygon(p, (-0.38, 0.06), (-0.05, 0.06), (-0.05, tall * 0.85)), sail, surface=seams)
    planks = stripes(p, p.y, 0.09)
    p.paint(polygon(p, (-0.36, -0.2), (0.4, -0.2), (0.6, 0.03), (-0.52, 0.03)), hull, surface=planks)
    p.paint(box(p, 0.02, 0.0, 0.52, 0.03), sail, bulge=0)


def fish(p):
    p.scene(WATER, tilt=0.6, low=-0.4, high=0.7)
    skin, fin = p.colours("#e0803a #f0e8dc", "#d8c04a #3a4a6a", "#8aa0b0 #c04a3a", "#b0504a #e0b060", "#4a5058 #98a8a8")
    eye, pupil = p.colours("#f4f0e4 #1c1c20")
    b = p.uniform(0.22, 0.32)
    body = ellipse(p, 0, 0, 0.5, b)
    p.paint(polygon(p, (-0.68, -0.26), (-0.36, 0), (-0.68, 0.26)), fin)
    p.paint(polygon(p, (-0.25, b * 0.7), (0.2, b * 0.8), (-0.2, b + 0.18)), fin)
    p.paint(body, skin, surface=scales(p, 0.13))
    for x in (-0.2, 0.08):
        p.paint(np.maximum(body, np.abs(p.x - x + p.y * p.y / 2) - 0.05), fin, bulge=0.1)
    p.paint(ellipse(p, 0.32, 0.06, 0.07, 0.07), eye, bulge=0)
    p.paint(ellipse(p, 0.33, 0.06, 0.04, 0.04), pupil, bulge=0)


def bird(p):
    p.scene(LAND, tilt=0.4, high=0.8)
    coat, breast = p.colours("#5a6a88 #e0905a", "#7a5a40 #e0d4bc", "#3a3a42 #d8b040", "#4a80b8 #e8e4dc")
    beak, eye, branch = p.colours("#d8a040 #16161a #5a4028", "#4a4a50 #d8d4cc #6a5848")
    p.paint(polygon(p, (-0.9, -0.54), (0.9, -0.46), (0.9, -0.38), (-0.9, -0.46)), branch)
    for x in (0.0, 0.12):
        p.paint(box(p, x, -0.3, 0.025, 0.14), beak, bulge=0)
    p.paint(polygon(p, (-0.75, -0.12), (-0.72, -0.24), (-0.3, -0.12), (-0.25, 0.1)), coat)
    p.paint(ellipse(p, 0, 0, 0.42, 0.25, 0.35), breast, surface=speckle(p))
    p.paint(polygon(p, (0.46, 0.25), (0.68, 0.33), (0.46, 0.4)), beak)
    p.paint(ellipse(p, 0.32, 0.32, 0.2, 0.2), coat)
    feathers = stripes(p, p.x + 2 * p.y, 0.2, 0.03)
    p.paint(ellipse(p, -0.12, 0.02, 0.34, 0.15, 0.4), coat, surface=feathers)
    p.paint(ellipse(p, 0.38, 0.36, 0.045, 0.045), eye, bulge=0)


def cat(p):
    p.scene(GARDEN, tilt=0.3, high=0.5)
    fur, ear, muzzle = p.colours(
        "#c88a4a #e8b8a0 #f0e8dc", "#6a6a70 #c09a98 #f0e8dc", "#e4dccc #dca8a0 #f0e8dc", "#4a3a30 #b08878 #8a7464"
    )
    iris, pupil, nose = p.colours("#a8c050 #16161a #b06a68", "#d8a840 #16161a #c08a80", "#70a8c8 #16161a #b06a68")
    p.shadow(0.05, -0.6, 0.6, 0.3)
    tabby = stripes(p, p.y - np.abs(p.x) / 2, 0.18, 0.1)
    p.paint(ellipse(p, 0, -0.75, 0.42, 0.5), fur, surface=tabby)
    for s in (-1, 1):
        corners = [(s * 0.14, 0.28), (s * 0.46, 0.1), (s * 0.44, 0.62)][::s]
        p.paint(polygon(p, *corners), fur)
        p.paint(polygon(p, *corners) + 0.07, ear, bulge=0)
    p.paint(ellipse(p, 0, 0, 0.5, 0.42), fur, surface=tabby)
    p.paint(ellipse(p, 0, -0.2, 0.22, 0.16), muzzle, bulge=0.1)
    for x in (-0.21, 0.21):
        p.paint(ellipse(p, x, 0.07, 0.11, 0.09), iris, bulge=0)
        p.paint(ellipse(p, x, 0.07, 0.04, 0.085), pupil, bulge=0)
    p.paint(polygon(p, (-0.07, -0.1), (0, -0.18), (0.07, -0.1)), nose, bulge=0)


def flower(p):
    p.scene(GARDEN, tilt=0.4, high=0.7)
    petal, heart, leaf = p.colours(
        "#e4dccc #d8a83a #4a7a34", "#c84a4a #4a3428 #7a9444", "#d8b040 #6a4028 #4a7a34", "#8a6ac0 #e0c060 #5a8050"
    )
    p.paint(polygon(p, (0.0, -1.6), (0.08, -1.6), (0.04, 0), (-0.04, 0)), leaf)
    p.paint(ellipse(p, 0.22, -0.62, 0.24, 0.1, 0.6), leaf)
    p.paint(ellipse(p, -0.17, -0.75, 0.22, 0.09, -0.6), leaf)
    long, wide, middle = p.uniform(0.2, 0.26), p.uniform(0.1, 0.17), p.uniform(0.14, 0.2)
    rings = stripes(p, np.sqrt(p.x * p.x + p.y * p.y), 0.2)
    for a in (2 * math.pi * k / 7 for k in range(7)):
        p.paint(ellipse(p, 0.3 * math.cos(a), 0.3 * math.sin(a), long, wide, a), petal, bulge=0.4, surface=rings)
    p.paint(ellipse(p, 0, 0, middle, middle), heart, surface=scales(p, 0.1))


def mushroom(p):
    p.scene(GARDEN, tilt=0.3)
    cap, stem, spot = p.colours(
        "#b83a30 #e8dcc4 #f0e8d8", "#9a6a40 #c8b494 #e0c8a0", "#d8a04a #e8dcc4 #8a5a30", "#7a5068 #b8a494 #f0e8d8"
    )
    w, h = p.uniform(0.42, 0.6), p.uniform(0.28, 0.5)
    p.shadow(0.08, -0.5, 0.4, 0.1)
    foot = polygon(p, (-0.19, -0.5), (0.19, -0.5), (0.13, 0.12), (-0.13, 0.12))
    p.paint(foot, stem, surface=stripes(p, p.x, 0.09, 0.02))
    p.paint(ellipse(p, 0, 0.08, w * 0.95, 0.09), stem)
    p.paint(np.maximum(ellipse(p, 0, 0.08, w, h), 0.08 - p.y), cap)
    for x, y in ((-0.5, 0.35), (-0.05, 0.6), (0.45, 0.4), (0.1, 0.2)):
        p.paint(ellipse(p, x * w, 0.08 + y * h, 0.08, 0.055), spot, bulge=0.1)


def cup(p):
    p.scene(GARDEN, tilt=0.1)
    glaze, band, drink = p.colours(
        "#e8e0d0 #4a6a9a #4a2c1c", "#b0503c #e8d8b8 #8a5a2c", "#4a7a80 #e0c070 #4a2c1c", "#c8a060 #6a4030 #c89a5a"
    )
    w, foot = p.uniform(0.3, 0.42), p.uniform(0.2, 0.3)
    body = polygon(p, (-foot, -0.4), (foot, -0.4), (w, 0.35), (-w, 0.35))
    p.shadow(0.12, -0.4, 0.6, 0.12)
    p.paint(ellipse(p, 0, -0.4, 0.58, 0.07), glaze)
    p.paint(np.abs(ellipse(p, w + 0.06, 0.02, 0.16, 0.16)) - 0.04, glaze)
    p.paint(body, glaze, surface=stripes(p, p.x, 0.14))
    p.paint(np.maximum(body, np.abs(p.y - 0.05) - 0.06), band, bulge=0.1)
    p.paint(ellipse(p, 0, 0.35, w, 0.09), glaze, bulge=0)
    p.paint(ellipse(p, 0, 0.34, w - 0.05, 0.065), drink, bulge=0)
