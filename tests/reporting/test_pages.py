"""The pages beside the papers: notes stand at their lines, values are those of the step, links lead somewhere."""
# ruff: noqa: E402  the extra `pages` may be missing

import dataclasses
import json
import re
from collections import defaultdict
from html.parser import HTMLParser
from itertools import combinations

import pytest
import torch

for library in ("pygments", "jinja2", "latex2mathml", "markdown_it", "mdit_py_plugins"):
    pytest.importorskip(library, reason="pip install '.[pages]'")

import cmae_loc
from methods import METHODS
from reporting import HERE
from reporting.pages import annotations, claims_and_losses, diagram, pictures, side_by_side, site, traced_step
from reporting.pages.ablations import SWITCHES
from reporting.pages.source import PAGES, Source, source
from runtime.command_line import field_comments
from runtime.errors import InputError

# ------------------------------------------------------------------------------------------------------ notes, places


SMALL = Source(
    "small", "class A:\n    @staticmethod\n    def f(x):\n        y = x + 1\n        return x + 1\n\n\nB = 2  # two\n"
)


def test_a_place_is_found_by_name_wherever_its_lines_have_moved():
    assert [SMALL.place(at) for at in ("A", "A.f", "A.f | y =", "A.f | return")] == [1, 2, 4, 5]
    moved = Source("small", "import torch\n\n\n" + SMALL.text)
    assert [moved.place(at) for at in ("A", "A.f", "A.f | y =", "A.f | return")] == [4, 5, 7, 8]


@pytest.mark.parametrize("at, said", [("A.g", "defines no A.g"), ("A.f | x + 1", "2 lines"), ("A.f | z", "0 lines")])
def test_a_place_that_is_missing_or_ambiguous_is_refused(at, said):
    with pytest.raises(InputError, match=said):
        SMALL.place(at)


def test_a_file_of_notes_is_read_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "EQUATIONS", tmp_path)
    head = "# Title\n\nFirst $x$.\n\n## Equation (4): a\nat: f | g\ntests: test_a.py::b, `test_a.py::c`\n"
    text = head + "$$ \\frac{a}{b} $$\nIt is `c`.\n\n## Diagram\na -> b @ f\n"
    (tmp_path / "x.md").write_text(text)
    title, introduction, (note,), diagram = annotations.read("x")
    assert (title, note.title, note.at, note.tests) == (
        "Title",
        "Equation (4): a",
        "f | g",
        ["test_a.py::b", "test_a.py::c"],
    )
    assert diagram == ["a -> b @ f"] and note.anchor == "note-equation-4-a" and "<mi>x</mi>" in introduction
    assert "<mfrac>" in note.parts(9)[0] and "<p>It is <code>c</code>.</p>" in note.parts(9)[0]
    (tmp_path / "x.md").write_text("# T\n## Equation (4)\n$$ a $$\n")
    with pytest.raises(InputError, match="no place"):
        annotations.read("x")
    (tmp_path / "x.md").write_text("# T\n## Equation (4)\nat: f\nclaims: no claim says this\n")
    with pytest.raises(InputError, match="0 statements"):
        annotations.read("x")
    for wrong in (r"$\nonsense{a}$", r"$\left( a$", r"$\mathbf x$"):  # browsers know no `mathvariant`
        with pytest.raises(InputError, match="not LaTeX"):
            annotations.render(wrong)


def test_no_line_begins_with_the_comma_behind_a_formula_nor_with_a_per_cent_sign_nor_breaks_at_a_times_sign():
    html = annotations.render("$a$ and 75 % of 2 × 3 $b$, (of $c$).")
    kept = re.findall(r"\"keep\">.*?<mi>(.)</mi>.*?</math></span>([,.)]+)</span>", html)
    assert kept == [("b", ","), ("c", ").")] and "75\N{NO-BREAK SPACE}%" in html
    assert "2\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}3 <" in html


def test_a_name_in_a_formula_is_set_as_a_name_and_not_with_the_spaces_of_an_operator():
    html = annotations.render(r"$\operatorname{pos}'_i + \lVert x \rVert$")
    assert "<mi>pos</mi>" in html and "<mo>&#x0002B;</mo>" in html
    assert '<mi scriptlevel="0">&#x02032;</mi>' in html  # a prime of full size
    assert html.count("<mi>&#x02016;</mi>") == 2  # as an operator, one of the two would be as high as the line


def test_a_note_higher_than_its_lines_folds_what_follows_the_first_sentences():
    text = "$$ a. $$\nIt is b (Eq. (1) of c. d). `e` is " + "f" * 120 + ". The last" + "g" * 300
    note = annotations.Note("", "", [], [], text)
    for lines, count in ((1, 1), (6, 1), (8, 2), (10, 2), (11, 3)):
        shown, folded = note.parts(lines)
        assert shown.count("<math") == 1 and "of c. d)." in shown and "<math" not in folded
        assert [part in shown for part in ("fff.", "The last")] == [count > 1, count > 2], lines
        assert [part in folded for part in ("fff.", "The last")] == [count < 2, count < 3], lines


# --------------------------------------------------------------------------------------------------- what flows


@pytest.mark.parametrize("name", METHODS)
def test_values_are_those_that_hooks_see_in_another_pass(steps, name):
    """What each module of our files returns: as often, of the same shape, gradient, mean and deviation."""
    step, seen, noted = steps[name][0], defaultdict(list), defaultdict(list)

    def hook(module, _, out):
        function = type(module).forward
        if function.__module__ in PAGES and isinstance(out, torch.Tensor):
            value = traced_step.measured(out)
            seen[function.__module__, function.__qualname__, value.shape, value.gradient].append(value[3:])

    if name == "dvae":
        step.method.update_teacher(0.0)  # back to the temperature of the step
    hooks = [module.register_forward_hook(hook) for module in step.method.modules()]
    step.method(step.batch)
    for one in hooks:
        one.remove()
    for (page, line, label), values in step.values.items():
        for qualified, definition in source(page).definitions.items():
            if label == "return" and qualified.endswith(".forward") and definition.first <= line <= definition.last:
                for value in values:
                    noted[page, qualified, value.shape, value.gradient].append(value[3:])
    assert len(seen) > 3 and (seen.keys() == noted.keys() or name == "cmae_loc")  # which has looked for boxes before
    for key, values in seen.items():
        assert len(values) == len(noted[key]) or name == "cmae_loc", key
        for value in values:
            assert any(value == pytest.approx(other, abs=1e-5) for other in noted[key]), key


def test_values_of_a_line_are_those_of_its_functions_called_alone(steps):
    step = steps["cmae"][0]
    method, batch, of = step.method, step.batch, source("cmae")
    z_s = method.encoder(batch.images, batch.mask.visible)
    with torch.no_grad():
        z_t = method.target_feature(batch.target_images, None)
    expected = dict(z_s=z_s, z_t=z_t, y_m=method.decoder(z_s, batch.mask), y_s=method.online_feature(z_s, batch.mask))
    for name, tensor in expected.items():
        (value,) = step.values["cmae", of.place(f"CMAE.forward | {name} ="), name]
        assert value[:3] == (tuple(tensor.shape), "float32", name != "z_t")
        assert value[3:] == pytest.approx((tensor.mean().item(), tensor.std(correction=0).item()), abs=1e-6)


PROMISED = re.compile(r"^\s*(\w+) = .*# .*?(\([BS](?:, [\w·+ ]+)+\))")
ALSO = {"V+M": "N", "places": "K·N", "codes or P": "codes"}


@pytest.mark.parametrize("name", METHODS)
def test_shapes_have_the_letters_that_the_comments_promise(steps, name):
    """A comment such as `# (B, 1 + V, D)` beside an assignment was written by hand; the chip is measured."""
    chips, checked = traced_step.chips(*steps[name]), 0
    for (page, line), row in chips.items():
        promise = PROMISED.match(source(name).lines[line - 1]) if page == name else None
        if promise:
            (chip,) = [chip for chip in row if chip.name == promise[1]]
            said = promise[2].replace("(S,", "(B,").replace(" + ", "+")  # ConMIM has a dictionary for each image
            for theirs, ours in (ALSO | ({"K": "N"} if name == "conmim" else {})).items():
                said = said.replace(theirs, ours)
            said = said if "2·B" not in chip.shape else said.replace("(B", "(2·B")  # LC-MAE's two views
            assert chip.shape == said, f"{name}.py:{line}"
            checked += 1
    assert checked >= dict(cmae=4, cae=3, conmim=5, mae=2, lcmae=1, cmae_loc=1).get(name, 0)


STOPPED = {
    "mae": "", "lcmae": "", "autoencoder": "", "dvae": "",
    "cmae": "z_t z_p", "cmae_loc": "q2 k1 k2 heat q k x scores", "cae": "z_bar_m", "conmim": "keys",
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_gradients_stop_where_the_papers_stop_them(steps, name):
    """And nowhere else: positions, pixels and masks are data, from which none would flow."""
    chips = traced_step.chips(*steps[name])
    stopped = {
        chip.name for (page, _), row in chips.items() for chip in row if chip.gradient == "stopped" and page == name
    }
    assert {x for x in stopped if x != "→"} == set(STOPPED[name].split())
    flows = {chip.name for (page, _), row in chips.items() for chip in row if chip.gradient == "flows" and page == name}
    assert "loss" in flows


def test_sides_of_pictures_and_grids_have_letters_of_their_own(steps):
    shapes = {
        name: {chip.shape for row in traced_step.chips(*steps[name]).values() for chip in row}
        for name in ("mae", "cmae", "dvae")
    }
    assert "(B, h, p, w, 3·p)" in shapes["mae"] and "(B, h, 8, w, 24)" in shapes["cmae"]  # whose p is a shift
    assert {"(B, 3, H, W)", "(B, 3, H+p, W+p)"} <= shapes["cmae"]
    assert {"(B, K, h, w)", "(B, hidden, 2·h, 2·w)"} <= shapes["dvae"]


def test_a_legend_has_the_letters_of_the_page_s_shapes_and_says_what_they_are(steps):
    for step, _ in steps.values():
        assert {letter for letter in traced_step.letters(step) if letter.isalpha()} <= traced_step.MEANINGS.keys()
    legends = {}
    for name in ("mae", "cmae"):
        for page in (name, "common"):
            rows = [row for (at, _), row in traced_step.chips(*steps[name]).items() if at == page]
            legends[name, page] = traced_step.legend(steps[name][0], rows)
    assert set(legends["cmae", "cmae"]) == set("BNDPVMdHp") and "h" in legends["cmae", "common"]
    assert legends["cmae", "cmae"]["p"].startswith("9 pixels, more than any shift")
    assert legends["mae", "common"]["p"] == "8 pixels a side of a patch" and "width" not in legends["mae", "common"]


def test_what_does_not_run_is_idle_and_nothing_else():
    of = source("cmae")
    ran, without = (traced_step.run_step("cmae", changes).ran["cmae"] for changes in ({}, dict(lambda_c=0.0)))
    full, alone = traced_step.idle(of, ran), traced_step.idle(of, without)
    at = ("forward | l_c =", 'forward | return {"loss": l_r}', "forward | l_r =", "draw_target | augment.shift_crop")
    places = [of.place(f"CMAE.{x}") for x in (*at, "picture | return")]
    assert [n in full for n in places] == [False, True, False, False, True]  # no step calls `picture`
    assert [n in alone for n in places] == [True, False, False, True, True]  # `draw_target` is called no more
    assert of.place("CMAE.picture") not in full and of.place('CMAE.picture | """') not in full
    assert not full & ran and not alone & without


def test_a_loop_a_condition_and_lines_that_go_on_are_noted_once_each():
    text = """
import torch
def f(x):
    for i in range(3):
        y = (
            x
            + i
        )
    if y.sum() < 0:
        z = y
    losses = {}
    losses['a'] = y.sum()
    with torch.no_grad():
        return y, losses
"""
    of, tracer, space = Source("toy", text), traced_step.Tracer(), {}
    tracer.files = {"toy.py": of}
    exec(compile(text, "toy.py", "exec"), space)
    tracer.trace(lambda: space["f"](torch.ones(2)))
    noted = {(line, name): [v.mean for v in values] for (_, line, name), values in tracer.values.items()}
    assert noted == {
        (3, "x"): [1], (5, "y"): [1, 2, 3], (12, "losses['a']"): [6], (14, "return[0]"): [3],
    }  # fmt: skip
    assert traced_step.idle(of, tracer.ran["toy"]) == {10}


# ----------------------------------------------------------------------------------------- settings, diagrams, pairs


def test_every_setting_of_a_table_can_be_chosen():
    """The comment of a field names its table; a step shows nothing of how the teacher moves or which file is read."""
    for name, Method in METHODS.items():
        comments = field_comments(Method.Config)
        changed = {key for _, changes in SWITCHES[name] for key in changes}
        assert all(key in comments for key in changed)
        missing = {key for key, comment in comments.items() if "Table" in comment} - changed
        assert missing == (dict(conmim={"momentum"}).get(name, set())), name


@pytest.mark.slow
def test_every_setting_changes_what_a_step_shows(steps):
    for name in METHODS:
        plain = steps[name][0]
        for label, changes in SWITCHES[name]:
            step = traced_step.run_step(name, changes)
            assert step.values != plain.values or step.ran != plain.ran, f"{name}: {label}"


def test_a_diagram_puts_boxes_below_what_leads_to_them_and_apart():
    for page in PAGES:
        lines = annotations.read(page).diagram
        boxes, edges = diagram.read(lines)
        depths = diagram.layers(boxes, edges)
        lanes = diagram.lanes(lines, depths)
        assert len({(lanes[name], depths[name]) for name in boxes}) == len(boxes)
        upwards = [edge for edge in edges if depths[edge[0]] >= depths[edge[1]]]
        assert len(upwards) <= (page == "train"), f"{page}: {upwards}"  # the loop is a circle
        svg = diagram.draw(lines, source(page))
        for name, (place, kind) in boxes.items():
            assert f'href="#L{source(page).place(place)}"' in svg, name
            assert kind == "average" or not name.startswith("moving average"), name
            assert not kind or f'class="{kind}"' in svg


def test_what_has_no_gradient_and_what_is_copied_look_different_in_a_diagram():
    svg = diagram.draw(["a @ A -> b [no gradient] @ A.f | y = -> c @ B", "a -> copy of a [EMA] @ A.f -> b"], SMALL)
    assert re.findall(r'<path class="(\w*)"', svg) == ["stopped", "stopped", "average", "average"]
    assert 'aria-label="copy of a"' in svg  # what is read aloud: the rows of a box would be read without spaces
    assert re.findall(r'<a class="(\w*)" href="#L(\d)"', svg) == [
        ("", "1"), ("stopped", "4"), ("", "8"), ("average", "2"),
    ]  # fmt: skip
    style = (site.TEMPLATES / "style.css").read_text()
    looks = re.findall(r"path\.(?:stopped|average) \{.*stroke: (.+?);.* stroke-dasharray: (.+?);", style)
    assert len(looks) == 2 and not set(looks[0]) & set(looks[1])


def test_two_methods_stand_beside_each_other_by_the_names_of_their_definitions():
    for left, right in (("mae", "cmae"), ("cae", "dvae")):
        pairs = side_by_side.compare(left, right)
        for side, page in enumerate((left, right)):
            numbers = sorted(n for pair in pairs if pair[side] for n, *_ in pair[side].lines)
            assert numbers == list(range(1, len(source(page).lines) + 1)), "each line once"
        assert all(a.name == b.name for a, b in pairs if a and b)
    named = {(a and a.name, b and b.name): (a, b) for a, b in side_by_side.compare("mae", "cmae")}
    _, b = named["the method.forward", "the method.forward"]
    assert ("masked_pixels", None) in named and (None, "byol_loss") in named
    assert not any(only for n, _, only, _ in b.lines if not source("cmae").lines[n - 1]), "blank: no difference"
    texts = {source("cmae").lines[n - 1].strip(): only for n, _, only, _ in b.lines}
    assert {source("cmae").lines[n - 1][indent - 1 : indent + 1] for n, *_, indent in b.lines} >= {" d", " l"}
    assert texts["def forward(self, batch: Batch) -> dict[str, Tensor]:"] is False
    assert texts["l_r = reconstruction_loss(y_m, pixels)  # Eq. (5)"] is True


def test_pictures_are_the_batch_s_the_boxes_and_what_a_method_makes(steps):
    rows = {name: re.findall(r"<span>(.+?)</span>", pictures.drawn(step)) for name, (step, _) in steps.items()}
    assert rows["cmae"] == [
        "images; framed: what is cut from them, at times mirrored",
        "the master image, cut from the frame; white: the online window; orange: the target&#x27;s",
        "images: the online view I_s", "mask; grey is hidden", "target images: the target view I_t",
    ]  # fmt: skip
    assert [name for name in rows if any("heat map" in row for row in rows[name])] == ["cmae_loc"]
    for name, (step, _) in steps.items():
        made, attends = pictures.made(step), name != "dvae"  # which has no ViT
        decodes = name in ("mae", "cmae", "cmae_loc", "lcmae")  # what is hidden, from what is visible
        assert made.count("data:image/webp") == len(step.method.picture(step.batch)) + attends + decodes, name
        assert made.count("attention of the class token") == attends, name
        assert made.count("attention of the framed hidden patch") == decodes, name


def test_attention_is_the_class_token_s_to_the_patches(steps, monkeypatch):
    step, seen = steps["mae"][0], {}
    monkeypatch.setattr(pictures, "strips", lambda rows, _: seen.update(rows))
    pictures.made(step)
    shown = seen["attention of the class token in the last block, mean over heads"]
    with torch.no_grad():
        heat = cmae_loc.class_attention(step.method.encoder, step.batch.images).unflatten(1, step.method.encoder.grid)
    torch.testing.assert_close(shown, pictures.shades(heat, (64, 64)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_of_the_decoder_is_that_of_the_framed_hidden_patch(steps):
    method, (images, mask) = steps["mae"][0].method, steps["mae"][0].batch
    shown, seen, last = pictures.decoding(method, images, mask), [], method.decoder.blocks[-1].attn
    hook = last.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    method(steps["mae"][0].batch)
    hook.remove()
    weights = pictures.measures.attention_weights(last, seen[0])  # of the class token, the visible, then the masked
    first = weights[:, :, 1 + mask.visible.shape[1], 1:].mean(dim=1)
    heat = torch.zeros(len(images), 64).scatter(1, mask.order(), first).unflatten(1, (8, 8))
    sides = torch.tensor([[16, 16]]).expand(len(images), 2)
    corners = 16 * torch.stack([mask.masked[:, 0] // 8, mask.masked[:, 0] % 8], dim=1)
    expected = pictures.enlarged(pictures.shades(heat, (64, 64)))
    expected = pictures.outlined(expected, torch.cat([corners, sides], dim=1), pictures.ORANGE)
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=1e-5)


def test_both_windows_lie_where_the_views_are_cut_from_the_master(steps, monkeypatch):
    """What is drawn white is the corner, what is drawn orange the window whose colours, unchanged, are the target's."""
    step, seen = steps["cmae"][0], {}
    monkeypatch.setattr(step.method, "config", dataclasses.replace(step.method.config, target_color=False))
    monkeypatch.setattr(pictures, "strips", seen.update)
    pictures.drawn(step)
    windows = next(rows for name, rows in seen.items() if name.startswith("the master"))
    images, target = seen["images: the online view I_s"], seen["target images: the target view I_t"]
    for picture, online, other in zip(windows, images, target, strict=True):
        orange = (picture == picture.new_tensor(pictures.ORANGE)[:, None, None]).all(dim=0).nonzero()
        down, right = ((orange.amin(dim=0) - 1) // pictures.ZOOM).tolist()
        window = picture[:, 2 * down :: 2, 2 * right :: 2][:, :64, :64]
        assert picture[:, :128:2, :128:2].sub(online).abs().median() < 1e-5 and not picture[:, 0, :128].any()
        assert window.sub(other).abs().median() < 1e-5


def test_the_box_of_a_heat_map_is_drawn_where_it_was_found(steps, monkeypatch):
    """At (top, left, bottom, right), shares of the sides, while boxes are drawn by height and width in pixels."""
    boxes = []
    monkeypatch.setattr(
        cmae_loc, "locate", lambda heat, *_: torch.tensor([[0.25, 0.25, 0.5, 0.75]]).repeat(len(heat), 1)
    )
    monkeypatch.setattr(pictures, "outlined", lambda x, where, *_: boxes.append(where) or x)
    pictures.drawn(steps["cmae_loc"][0])
    assert boxes[-1].tolist() == [[32, 32, 32, 64]] * traced_step.IMAGES


def test_boxes_are_drawn_at_their_edges():
    grey, box = torch.full((1, 3, 12, 12), 0.5), torch.tensor([[1.0, 2.0, 9.0, 8.0]])
    (picture,), (other,) = pictures.outlined(grey, box), pictures.outlined(grey, box, pictures.ORANGE)
    white, black = (picture[0] == 1).nonzero(), (picture[0] == 0).nonzero()
    assert [x.amin(dim=0).tolist() for x in (black, white)] == [[1, 2], [2, 3]]
    assert [x.amax(dim=0).tolist() for x in (black, white)] == [[9, 9], [8, 8]]
    assert len(black) == 30 and len(white) == 22 + 14 and (picture[0] == 0.5).sum() == 144 - 66
    assert (other[:, picture[0] == 1] == torch.tensor(pictures.ORANGE)[:, None]).all() and (other == 0).sum() == 3 * 30


def test_claims_have_the_verdicts_of_the_document():
    document = (HERE / "docs/claims.md").read_text()
    claims = [claim for page in PAGES for note in annotations.read(page).notes for claim in note.claims]
    assert len(claims) > 5
    harms = next(claim for claim in claims if claim["statement"].startswith("too much contrast"))
    assert [of for of, _ in claims_and_losses.measured(harms)["numbers"]] == ["cmae --lambda-c 2", "cmae"]
    slow = claims_and_losses.measured(next(claim for claim in claims if "slow copy" in claim["statement"]))["numbers"]
    assert slow[1][0] == "conmim --dictionary image --mask-cell 2 --lr 1e-3"
    for claim in claims:
        found = claims_and_losses.measured(claim)
        assert f"- **{found['verdict']}** {found['where']}: {found['statement']}." in document
        assert f"| {found['paper']} |" in document
        assert " → ".join(number for _, number in found["numbers"]) in document
        recipe = (
            r"demo recipe with 10 classes .* 18 epochs, crop_scale=0.2; .* took \d+ to .*; mean ± deviation of 3 seeds"
        )
        assert re.match(recipe if found["numbers"] else "$", found["how"]), claim
        if any(side.endswith("top1") for side in claim["sides"]):
            assert "top-1 %" in found["measure"], claim


def test_the_curve_stands_below_the_line_that_returns_the_whole_loss(monkeypatch, tmp_path):
    monkeypatch.setattr(claims_and_losses, "curve", lambda name: f"curve of {name}")
    monkeypatch.setattr(pictures, "drawn", lambda step: "")
    last = dict(mae="reconstruction_loss(", cmae="l_r + self", cae="l_y + self", conmim='return {"loss"')
    for name, line in last.items():
        place = source(name).place(f"{METHODS[name].__name__}.forward | {line}")
        assert site.shown(name, None, tmp_path)[place] == f"curve of {name}"


def test_a_curve_has_its_numbers_at_its_ticks(tmp_path, monkeypatch):
    losses = [dict(epoch=1, loss=4.0), dict(epoch=8, loss=1.0)]
    config = dict(recipe="demo", data="x", model="nano", epochs=8, crop_scale=0.2, batch_size=64, official_scale=True)
    run = dict(measured={}, loss=losses)
    text = json.dumps(dict(method="mae", commands={}, config=config, runs=[run], stale="old"))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/mae.json").write_text(text)
    monkeypatch.setattr(claims_and_losses, "RESULTS", tmp_path)
    assert claims_and_losses.curve("cmae") == ""
    (tmp_path / "cpu/cmae.json").write_text(text.replace("stale", "fresh"))
    about = "; unlike the step, with batch_size=64, official_scale=True; results/cpu/cmae.json<"
    assert about in claims_and_losses.curve("cmae")
    svg = claims_and_losses.curve("mae")
    assert "demo recipe with x, nano encoder, 8 epochs, crop_scale=0.2; unlike the step, with batch_size=64; " in svg
    assert "; results/cpu/mae.json, made by an earlier version of the code<" in svg
    assert re.findall(r">([\d.]+)</text>", svg) == ["0", "0", "2", "4", "4", "8"]
    assert 'points="50.5,8.0 208.0,66.5"' in svg and "loss 4 → 1" in svg  # an eighth of 180 from 28; a quarter of 78 up


# -------------------------------------------------------------------------------------------------------- the site


class Parsed(HTMLParser):
    """The ids, links and code of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.lines = [], [], []
        self.inside = self.expected = False  # in a line of code, or right before it
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src") if name in given]
        if "line" in given.get("class", "").split():
            self.lines.append("")
            self.expected = True
        if tag == "code":
            self.inside, self.expected = self.expected, False

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "code"

    def handle_data(self, data):
        if self.inside:
            self.lines[-1] += data


def test_pages_hold_their_source_and_their_links_lead_somewhere(built):
    parsed = {file.name: Parsed(file.read_text()) for file in built.glob("*.html")}
    pairs = {f"{a}-{b}.html" for a, b in combinations(METHODS, 2)}
    assert set(parsed) == {"index.html", *(f"{page}.html" for page in PAGES)} | pairs
    for name, page in parsed.items():
        assert len(page.ids) == len(set(page.ids)), name
        for link in page.links:
            file, _, anchor = link.partition("#")
            if link.startswith("data:"):
                continue
            assert not re.match(r"\w+:", file), f"{name}: {link} needs a network"
            assert not file or (built / file).exists(), f"{name}: {link}"
            assert not anchor or anchor in parsed[file or name].ids, f"{name}: {link}"
    assert all(
        f"{note.anchor}" in parsed[f"{page}.html"].ids for page in PAGES for note in annotations.read(page).notes
    )
    for page in PAGES:
        assert parsed[f"{page}.html"].lines == source(page).lines
        assert (built / f"{page}.html").stat().st_size < 3e6
    for name in ("mae.html", "mae-cmae.html"):  # the Tab key stops at names and not at each line
        assert set(re.findall(r'<a class="no"[^>]*?( tabindex="-1")?>', (built / name).read_text())) == {
            ' tabindex="-1"'
        }


def test_a_function_that_another_setting_has_no_use_for_is_faint(built):
    text = re.search(r'id="switches">(.+?)</script>', (built / "cmae.html").read_text(), re.DOTALL)[1]
    plain, other = json.loads(text)
    line = source("cmae").place("CMAE.draw_target | augment.shift_crop")
    assert other["name"].startswith("no contrast") and line in other["idle"] and line not in plain["idle"]


def test_a_symbol_is_found_as_it_is_shown_and_as_it_is_typed(built):
    index = json.loads((built / "search.js").read_text().removeprefix("const INDEX = ").rstrip(";\n"))
    for symbol in ("ρ", "\\rho"):
        found = [where for _, text, where in index if symbol in text]
        assert "cmae.html#note-equations-6-and-7-the-contrast" in found and len(found) < 9, symbol
    assert not any("<" in text and "math" in text for _, text, _ in index)


def test_an_equation_of_a_shared_function_is_said_to_be_of_the_paper_whose_file_it_names(built):
    """On the page of the other CMAE, "CMAE's Eq. (7)" could be its own."""
    hints = re.findall(r'title="(\w+\.info_nce: .+?\))', (built / "cmae_loc.html").read_text())
    assert hints and set(hints) == {"common.info_nce: cmae.py&#x27;s Eq. (7)"}
    assert "of The other CMAE" in (built / "cmae_loc.html").read_text()  # as inputs/augment.py says
    assert '<span class="o">-&gt;</span> Tensor' in (built / "cmae_loc.html").read_text()  # no line breaks in an arrow


def test_a_legend_says_what_lines_of_the_diagram_mean_where_there_are_such(built):
    said = {name: (built / f"{name}.html").read_text() for name in ("mae", "cae", "cmae")}
    assert ["dashed lines let none pass" in text for text in said.values()] == [False, True, True]
    assert ["dotted lines copy weights" in text for text in said.values()] == [False, False, True]


def test_names_lead_to_their_definitions():
    """Of this file, of another page, of a field of what a parameter is, of what a class inherits."""

    def leads(page, place, word):
        number = source(page).place(place)
        return source(page).links[number, source(page).lines[number - 1].index(word)]

    assert leads("cmae", "CMAE.forward | l_r =", "reconstruction_loss") == ("common", "reconstruction_loss")
    assert leads("cmae", "CMAE.forward | pixels =", "masked_pixels") == ("mae", "masked_pixels")
    assert leads("cmae", "CMAE.forward | z_s =", "visible") == ("common", "Mask.visible")
    assert leads("cmae", "CMAE.forward | l_c =", "contrast") == ("cmae", "CMAE.contrast")
    assert leads("cmae", "CMAE.contrast | loss =", "tau") == ("cmae", "Config.tau")
    assert leads("cmae_loc", "Decoder.features | x = self.embed", "embed") == ("mae", "Decoder.embed")
    assert leads("cmae", "CMAE.draw | view =", "normalize") == ("inputs.augment", "normalize")
    for page in PAGES:
        for module, name in source(page).links.values():
            assert name in source(module).definitions
