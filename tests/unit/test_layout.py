"""Folders as people have them: what is taken for a class, a split, a name, and what is excluded."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data.labels import are_codes
from data.layout import read_layout
from data.sources import Reading, load_ood_images, load_source
from data.survey import MAX_DEPTH, Excluded, Folder, survey
from tests.conftest import ROOT
from utils.logging_utils import UserError

CLASSES = ("daisy", "rose")


def draw(path, format="PNG"):
    """A small image, unlike all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (4, 4), random.Random(str(path)).randbytes(48)).save(path, format)


@pytest.fixture
def tree(tmp_path):
    """Folders with so many images each, and what `read` makes of them."""

    def make(*folders, images=3, at="", class_names=None, **counts):
        for folder in [*folders, *counts]:
            for number in range(counts.get(folder, images)):
                draw(tmp_path / "my plants" / folder / f"{number}.png")
        return lambda: load_source(str(tmp_path / "my plants" / at), Reading("", False, 0, False, None, class_names))

    make.root = tmp_path / "my plants"
    return make


def in_each(*parents):
    return [f"{parent}/{name}" for parent in parents for name in CLASSES]


@pytest.mark.parametrize(
    ("folders", "names", "splits"),
    [
        (in_each("."), CLASSES, {"train": 6}),
        (in_each("Training", "valid", "test_set"), CLASSES, {"train": 6, "validation": 6, "test": 6}),
        (in_each("Entra\u00eenement", "Validaci\u00f3n", "Testdaten"), CLASSES,
         {"train": 6, "validation": 6, "test": 6}),
        (in_each("\u8bad\u7ec3\u96c6", "\u6d4b\u8bd5\u96c6"), CLASSES, {"train": 6, "test": 6}),
        (in_each("trainA", "TestB"), CLASSES, {"train": 6, "test": 6}),
        (in_each("TRAIN", "Dev"), CLASSES, {"train": 6, "validation": 6}),
        (in_each("seg_train/seg_train", "seg_test/seg_test"), CLASSES, {"train": 6, "test": 6}),
        (in_each("plants_train", "plants_test"), CLASSES, {"train": 6, "test": 6}),
        (in_each("PlantsTrain", "PlantsVal"), CLASSES, {"train": 6, "validation": 6}),
        ([*in_each("labeled"), "unlabeled"], CLASSES, {"train": 6}),
        (["train/Basil/healthy", "train/Basil/diseased", "train/Mango/healthy", "train/Mango/diseased"],
         ("Basil diseased", "Basil healthy", "Mango diseased", "Mango healthy"), {"train": 12}),
        (in_each("set/train.v1", "set/test.v1"), CLASSES, {"train": 6, "test": 6}),
        ([*in_each("data/images"), "paper", "docs/plots"], CLASSES, {"train": 6}),
        (in_each("a/b/c"), CLASSES, {"train": 6}),
        (in_each("set/images/train", "set/images/eval"), CLASSES, {"train": 6, "test": 6}),
        (["daisy/train", "daisy/test", "rose/train"], CLASSES, {"train": 6, "test": 3}),
        ([*in_each("test"), *CLASSES], CLASSES, {"train": 6, "test": 6}),
        (["train/Acer/rubrum", "train/Salix/alba", "train/Salix/nigra", "test/Acer/rubrum"],
         ("Acer rubrum", "Salix alba", "Salix nigra"), {"train": 9, "test": 3}),
        (["train/Apple/healthy", "train/Apple/scab", "train/Pear/healthy", "test/Apple/healthy", "test/Apple/scab"],
         ("Apple healthy", "Apple scab", "Pear healthy"), {"train": 9, "test": 6}),
        (["Acer/campestre", "Acer/rubrum", "Salix/alba"], ("Acer campestre", "Acer rubrum", "Salix alba"),
         {"train": 9}),
        (["Salix/alba", "Populus/alba"], ("Populus alba", "Salix alba"), {"train": 6}),
        (["Rosaceae/Rosa/canina", "Fagaceae/Fagus/sylvatica"], ("Fagus sylvatica", "Rosa canina"), {"train": 6}),
        (["Climbers/ivy", "Climbers/hop", "moss"], ("hop", "ivy", "moss"), {"train": 9}),
        (["daisy", "rose/balcony", "oak/New folder"], ("daisy", "oak", "rose"), {"train": 9}),
        (["Tomato/healthy", "Tomato/blight", "Potato/healthy", "Potato/scab"],
         ("Potato healthy", "Potato scab", "Tomato blight", "Tomato healthy"), {"train": 12}),
        ([f"{name}/{part}" for name in CLASSES for part in ("flower", "leaf")], CLASSES, {"train": 12}),
        ([f"{name}/{part}" for name in CLASSES for part in ("2021", "2022-05-01")], CLASSES, {"train": 12}),
        ([f"{name}/images" for name in CLASSES], CLASSES, {"train": 6}),
        (["daisy/leaf", "daisy/2021", "daisy/plant_1", "rose"], CLASSES, {"train": 12}),
        (["001.Black_rose", "002.Daisy"], ("Black rose", "Daisy"), {"train": 6}),
        (["12_rose", "7_daisy"], ("rose", "daisy"), {"train": 6}),
        (["(1) rose", "(2) daisy"], ("rose", "daisy"), {"train": 6}),
        (["01rose", "02daisy"], ("rose", "daisy"), {"train": 6}),
        (["Rosa_canina_3117424", "Bellis_perennis_L._2888439"], ("Bellis perennis L.", "Rosa canina"), {"train": 6}),
        (["06000_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Bellis_perennis",
          "05729_Plantae_Tracheophyta_Liliopsida_Asparagales_Orchidaceae_Ophrys_apifera"],
         ("Ophrys apifera", "Bellis perennis"), {"train": 6}),
        (["Apple___Black_rot", "Corn_(maize)___Common_rust_"], ("Apple: Black rot", "Corn (maize): Common rust"),
         {"train": 6}),
        (["cafe\u0301", "r\u200bose"], ("caf\u00e9", "rose"), {"train": 6}),
    ],
)  # fmt: skip
def test_classes_and_splits(folders, names, splits, tree):
    source = tree(*folders)()
    assert tuple(source.class_names) == names
    assert {split: len(rows) for split, rows in source.splits.items()} == splits
    for rows in source.splits.values():
        assert all(os.path.isfile(row["image"]["path"]) for row in rows) and len(set(rows["id"])) == len(rows)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (in_each("color", "grayscale", "segmented"),
         r"3 folders hold folders of the same names.*--dataset '.*/my plants/color', --dataset '.*/grayscale', --data"),
        (in_each("Train_Test_Train", "Train_Test_Test"), "if splits, call them train, validation and test"),
        (in_each("lab/train", "field/train"), "holds 2 data sets; give one of them: --dataset '.*/field', --data"),
        (in_each("train", "Training"), "'Training' and 'train' are both taken for train; rename one"),
        (["trainA", "trainB"], "'trainA' and 'trainB' are both taken for train; rename one"),
        (in_each("val", "test"), "has test and val, and no train folder to learn from; add one"),
        ([*in_each("val", "test"), "pool"], "has test and val, and no train folder to learn from; add one"),
        (["train"], "3 images lie here, none in a class folder; move them to <class name>/photo.jpg, or give a table"),
        (["images"], "my plants/images: 3 images lie here, none in a class folder"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_or_none_is_refused_with_what_to_give(folders, words, tree):
    with pytest.raises(UserError, match=words):
        tree(*folders)()


@pytest.mark.parametrize(
    ("folders", "reported"),
    [
        ([*in_each("train"), "orchid"], "images beside the split folders: 3 (orchid)"),
        ([*in_each("train"), "test"], "images of test without class folders, so they cannot be scored: 3 (test)"),
        ([*CLASSES, "test"], "images of test without class folders, so they cannot be scored: 3 (test)"),
        (
            [*in_each("train"), "test/unknown"],
            "images of test without class folders, so they cannot be scored: 3 (test)",
        ),
        ([*CLASSES, "rose/climbing"], "images in a folder inside a class folder: 3 (rose/climbing)"),
        ([*CLASSES, *in_each("copy")], "images in a folder with the same classes again: 6 (copy)"),
        ([*CLASSES, *in_each("old/train")], "images of a data set among the class folders: 6 (old)"),
        ([*in_each("set/train"), "set2"], "images beside the data set: 3 (set2)"),
        ([*in_each("set"), "docs"], "images beside the data set: 3 (docs)"),
        ([*CLASSES, "thumbnails"], "images in folders that name no class: 3 (thumbnails)"),
        ([*CLASSES, "."], "images in no class folder: 3 (0.png)"),
    ],
)
def test_images_that_are_not_used_are_reported(folders, reported, tree):
    source = tree(*folders)()
    assert tuple(source.class_names) == CLASSES and f"not used: {reported}" in source.warnings


@pytest.mark.parametrize("table", ["set/test.csv", "set/test/labels.csv"])
@pytest.mark.parametrize("labels", ["daisy,rose,rose", "daisy,daisy,daisy", "1,2,1"])
def test_a_table_labels_a_split_without_class_folders(labels, table, tree):
    load = tree(*in_each("set/train"), "set/test")
    rows = [f"{number}.png,{label}" for number, label in enumerate(labels.split(","))]
    (tree.root / table).write_text("\n".join(["Path,ClassId", *rows]))
    source = load()
    assert tuple(source.class_names) == CLASSES and len(source.splits["train"]) == 6
    if labels == "daisy,rose,rose":  # of one class alone: the example of an answer; of others: not those of train
        assert [CLASSES[label] for label in source.splits["test"]["label"]] == ["daisy", "rose", "rose"]
        assert source.splits["test"]["id"][0] == "test/0.png" and source.warnings == []
        assert any(note.startswith("labels from column ClassId of ") for note in source.notes)
    else:
        assert "test" not in source.splits
        assert (
            "not used: images of test without class folders, so they cannot be scored: 3 (set/test)" in source.warnings
        )


def put_plants(tree, flat=("test",), of_test=9, table="", rows=(), header="file,label"):
    """train/<class>/ with 0.png to 35.png, flat splits, and a table beside them; what is read."""
    for number in range(36):
        draw(tree.root / "train" / CLASSES[number % 2] / f"{number}.png")
    for split in flat:
        for number in range(of_test):
            draw(tree.root / split / f"{number}.png")
    (tree.root / table).write_text("\n".join([header, *rows]))
    return tree(images=0)()


LABELS = [f"{number}.png,{CLASSES[number % 2]}" for number in range(36)]


@pytest.mark.parametrize(
    ("table", "rows", "header"),
    [
        ("train.csv", LABELS, "file,label"),
        ("train_labels.csv", LABELS[:6], "file,label"),
        ("val.csv", LABELS[:9], "file,label"),
        ("labels.csv", LABELS, "file,label"),
        ("labels.csv", LABELS[:9], "file,label"),
        ("plants.csv", [row.replace(".png", "") for row in LABELS], "file,label"),
        ("plants.csv", [f"train/{row.partition(',')[2]}/{row}" for row in LABELS], "file,label"),
        ("labels.csv", [f"{row},train" for row in LABELS], "file,label,split"),
        ("labels.csv", [f"{row},{int(number > 3)}" for number, row in enumerate(LABELS)], "file,label,is_train"),
    ],
)
def test_a_table_of_other_images_labels_no_split_without_class_folders(table, rows, header, tree):
    source = put_plants(tree, table=table, rows=rows, header=header)
    given = len(source.splits.get("test", ()))
    assert given == (4 if "is_train" in header else 0) and len(source.splits["train"]) == 36
    words = "images without a row in a table: 5 (test/4.png, " if given else "so they cannot be scored: 9 (test)"
    assert any(words in line for line in source.warnings)


def test_a_table_labels_the_flat_split_of_its_name(tree):
    rows = [f"{number}.png,{CLASSES[number < 4]}" for number in range(9)]
    source = put_plants(tree, ("test", "val"), table="test.csv", rows=rows)
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 36, "test": 9}
    assert [CLASSES[label] for label in source.splits["test"]["label"]] == ["rose"] * 4 + ["daisy"] * 5
    assert any("images of validation" in line or "images of val " in line for line in source.warnings)


@pytest.mark.parametrize(
    ("rows", "num_test", "words"),
    [
        (LABELS[:5], 5, "images without a row in a table: 4 (test/5.png, test/6.png, test/7.png, ...)"),
        (
            LABELS[:12],
            9,
            "rows of test.csv whose file is not in test/: 3 (train/rose/9.png, train/daisy/10.png, train/rose/11.png)",
        ),
        ([*LABELS[:8], "8.png,Tulip"], 0, "test.csv: labels that no class folder has: Tulip"),
        (["0.png,daisy", "1.png,daisy"], 0, "test.csv: one label for all images, daisy"),
    ],
)
def test_what_a_table_of_a_flat_split_leaves_out_is_said(rows, num_test, words, tree):
    source = put_plants(tree, table="test.csv", rows=rows)
    assert len(source.splits.get("test", ())) == num_test
    assert f"not used: {words}" in source.warnings


def test_a_table_of_a_flat_split_that_cannot_be_read_is_said(tree):
    source = put_plants(tree, table="labels.csv", rows=LABELS[:9])
    assert any("several images have the file names in column file, such as 0.png" in line for line in source.warnings)


class CountingPath(type(Path())):
    compared = 0

    def __eq__(self, other):
        CountingPath.compared += 1
        return super().__eq__(other)

    __hash__ = Path.__hash__


def test_no_step_is_quadratic_in_the_number_of_classes():
    root = Folder(CountingPath("a"), num_images=1500)
    root.folders = [Folder(root.path / f"plant {n}", ["1.jpg"] * 3, num_images=3) for n in range(500)]
    assert (
        len(read_layout(root, Excluded(root.path)).names) == 500 and CountingPath.compared < 20 * 500
    )  # quadratic: 125,000


def test_what_lies_beside_the_data_set_is_reported_too(tree):
    load = tree(*in_each("set/images"))
    for name in ("set/train.txt", "set/test.txt", "set.zip"):
        (tree.root / name).write_text("daisy/0\n")
    assert load().warnings == [
        "not used: .txt files: 2 (set/test.txt, set/train.txt)", "not used: .zip files: 1 (set.zip)"
    ]  # fmt: skip


def test_notes_say_what_was_taken_for_what(tree):
    source = tree(*in_each("set/train", "set/val"))()
    assert source.notes == [
        f"{tree.root} holds one data set, set: it is used", "class folders: 2 in train/; 2 in val/ (validation)"
    ]  # fmt: skip


def test_names_that_are_one(tree):
    source = tree("tea_rose", "tea rose", "Rose", "rose.", "oak", "train-val")()
    assert source.class_names == ["Rose", "oak", "tea rose", "train-val"]
    assert [line for line in source.warnings if "read as one class" in line] == [
        "'Rose' and 'rose.' are read as one class, 'Rose'; rename one if they differ",
        "'tea rose' and 'tea_rose' are read as one class, 'tea rose'; rename one if they differ",
    ]
    assert set(source.splits["train"]["label"]) == {0, 1, 2, 3} and len(source.splits["train"]) == 18


def test_codes_for_names_are_warned_of(tree):
    (warning,) = tree("1", "2", "17")().warnings
    assert warning.startswith("classes are called 1, 17, 2, and the model would answer with that;")
    assert "--class-names FILE" in warning


@pytest.mark.parametrize(
    ("names", "codes"),
    [(("a1f3", "b2c9"), True), (("5d41402abc4b", "7d793037a076"), True), (("maize B73", "Mo17"), False)],
)
def test_names_without_a_word_are_codes(names, codes):
    assert are_codes(names) == codes


def test_junk_and_runs_are_no_classes(tree, monkeypatch):
    read = tree(
        *CLASSES,
        "__MACOSX/daisy",
        "node_modules/icons",
        "@eaDir",
        ".ipynb_checkpoints",
        "runs/tiny",
        "New folder",
        **{"New folder": 0},
    )
    (tree.root / "New folder").mkdir()
    (tree.root / "runs/tiny/training_config.json").write_text("{}")
    for name in ("._0.png", ".trashed-1.png", "Thumbs.db", "desktop.ini"):
        (tree.root / "daisy" / name).write_bytes(b"x")
    source = read()
    assert tuple(source.class_names) == CLASSES and len(source.splits["train"]) == 6
    assert source.warnings == [
        "not used: folders that are a training run: 1 (runs/tiny)",
        "not used: folders without images: 2 (New folder, runs)",
    ]  # fmt: skip
    monkeypatch.chdir(tree.root)
    here = load_source(".", Reading("", False, 0, False, None, None))
    assert here.splits["train"]["id"] == source.splits["train"]["id"]


def test_images_are_known_by_content_and_other_files_are_reported_by_kind(tree):
    read = tree(*CLASSES)
    draw(tree.root / "rose" / "no suffix")
    draw(tree.root / "rose" / "page.jpg_large", "JPEG")
    contents = {"a.MOV": b"moov", "b.mov": b"moov", "empty.jpg": b""} | dict.fromkeys(
        ("c.txt", "d.nef", "e.zip"), b"II*\0"
    )
    for name, content in contents.items():
        (tree.root / "daisy" / name).write_bytes(content)
    source = read()
    assert len(source.splits["train"]) == 8
    assert source.warnings == [
        "not used: .mov files: 2 (daisy/a.MOV, daisy/b.mov)",
        "not used: .nef files: 1 (daisy/d.nef)",
        "not used: .txt files: 1 (daisy/c.txt)",
        "not used: .zip files: 1 (daisy/e.zip)",
        "not used: empty image files (0 bytes): 1 (daisy/empty.jpg)",
    ]


def test_the_table_of_names_of_a_relative_path_is_used_and_not_listed_as_unused(tree, monkeypatch):
    tree("images/1", "images/2")
    (tree.root / "cat_to_name.json").write_text('{"1": "daisy", "2": "rose"}')
    monkeypatch.chdir(tree.root.parent)
    source = load_source(tree.root.name, Reading("", False, 0, False, None, None))
    assert tuple(source.class_names) == CLASSES and not source.warnings


def test_links_neither_loop_nor_show_a_folder_twice(tree, tmp_path):
    read = tree(*CLASSES)
    draw(tmp_path / "disk" / "oak" / "0.png")
    os.symlink(tmp_path / "disk" / "oak", tree.root / "oak")
    os.symlink(tree.root, tree.root / "rose" / "loop")
    os.symlink(tree.root / "rose", tree.root / "rosa")
    os.symlink(tmp_path, tree.root / "up")
    os.symlink(tmp_path / "gone.png", tree.root / "rose" / "gone.png")
    os.mkfifo(tree.root / "rose" / "pipe.png")
    source = read()
    assert source.class_names == ["daisy", "oak", "rose"] and len(source.splits["train"]) == 7
    assert source.warnings == [
        "not used: devices or pipes: 1 (rose/pipe.png)",
        "not used: links to a folder that is read already, or above: 3 (rose/loop, rosa, up)",
        "not used: links to nowhere: 1 (rose/gone.png)",
    ]


def test_folders_far_down_are_excluded(tree):
    tree(*CLASSES)
    folder = tree.root / "daisy" / "/".join("d" * (MAX_DEPTH + 2))
    draw(folder / "0.png")
    found, excluded = survey(tree.root)
    assert found.num_images == 6 and f"folders more than {MAX_DEPTH} levels down" in excluded.lines()[0]


def test_a_class_whose_images_cannot_be_read_is_refused(tree):
    read = tree(*CLASSES)
    for name in ("tulip/a.nef", "lily/b.zip"):
        (tree.root / name).parent.mkdir()
        (tree.root / name).write_bytes(b"II*\0")
    with pytest.raises(
        UserError, match="tulip with nothing but raw files of a camera.*; lily with nothing but archives: unp"
    ):
        read()


def test_images_of_an_iphone_are_read_or_it_is_said_what_reads_them(tree, monkeypatch):
    read = tree(*CLASSES)
    for number in range(4):
        draw(tree.root / f"oak/IMG_{number}.HEIC", "HEIF")
    draw(tree.root / "rose/IMG_9.heic", "HEIF")
    assert read().class_names == ["daisy", "oak", "rose"] and len(read().splits["train"]) == 11
    monkeypatch.setattr("data.survey.reads_heif", lambda: False)
    with pytest.raises(UserError, match="oak with nothing but HEIC/HEIF images: pip install pillow-heif"):
        read()
    shutil.rmtree(tree.root / "oak")
    (line,) = [line for line in read().warnings if "HEIC" in line]
    assert line.endswith("which pillow-heif reads (pip install pillow-heif): 1 (rose/IMG_9.heic)")
    for name in CLASSES:
        for path in (tree.root / name).glob("*.png"):
            path.unlink()
    with pytest.raises(UserError, match=r"no images found; .*HEIC/HEIF images, which pillow-heif reads \(pip install"):
        read()


def test_a_class_folder_whose_name_is_no_name(tree):
    with pytest.raises(UserError, match="labels without a name: '___'; rename them, or use --class-names FILE"):
        tree("rose", "daisy", "___")()


def test_a_folder_that_cannot_be_listed(tmp_path):
    with pytest.raises(UserError, match="gone: cannot be listed .No such file.*; check the path and its permissions"):
        survey(tmp_path / "gone")


def test_folder_names_that_are_not_utf8(tree):
    read = tree(*CLASSES)
    os.rename(tree.root / "rose", os.fsencode(tree.root) + b"/ros\xe9")
    with pytest.raises(UserError, match=r"ros\\udce9/.*: the path is not UTF-8, which Arrow needs; rename its folders"):
        read()


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("https://example.org/flowers.zip", "is a web address; download it, unpack it, and give the folder"),
        ("{root}.zip", "is an archive; unpack it first: unzip 'my plants.zip' -d 'my plants', and give the folder"),
        ("{root}/rosa's.zip", "is an archive; unpack it first: unzip 'rosa'\"'\"'s.zip' -d 'rosa'\"'\"'s', and give"),
        ("{root}.tar.gz", "is an archive; unpack it first: mkdir 'my plants' && tar -xf 'my plants.tar.gz' -C"),
        ("{root}/daisy/0.png", "is an image; give the folder that holds the class folders, or a table"),
        ("kaggle.com/datasets/a/b", "is a web address; download it"),
        ("{root}/gone", "is a link to nowhere .elsewhere.; give the folder itself"),
        ("x" * 5000, "xxx: no such folder or file; give a folder, a table, owner/name"),
        ("a\0b", "'a.x00b': no such folder or file; give a folder"),
        ("~nobody.of.this.name/plants/a", "no such folder or file; give a folder"),
        ("{root}/notes.pdf", "is a file; give the folder that holds the class folders, or a table"),
        ("{root}s", "no such folder or file; .*; did you mean .*/my plants.?"),
    ],
)  # fmt: skip
def test_what_is_no_folder(dataset, words, tree):
    tree(*CLASSES)
    for path in (f"{tree.root}.zip", f"{tree.root}.tar.gz", tree.root / "rosa's.zip", tree.root / "notes.pdf"):
        with open(path, "wb") as file:
            file.write(b"PK")
    (tree.root / "gone").symlink_to("elsewhere")
    with pytest.raises(UserError, match=words):
        load_source(dataset.format(root=tree.root), Reading("", False, 0, False, None, None))


def test_archives_alone_and_boxes(tree):
    read = tree()
    tree.root.mkdir()
    (tree.root / "daisy.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="holds no images but 1 archives such as daisy.zip; unpack them first: unzip"):
        read()
    read = tree("train/images")
    (tree.root / "train/labels").mkdir()
    (tree.root / "train/labels/0.txt").write_text("0 .5 .5 1 1")
    with pytest.raises(UserError, match=r"looks like a detection data set \(boxes in .*0.txt\)"):
        read()


@pytest.mark.parametrize(
    ("below", "groups"),
    [("plant_1", 3), ("visit 2", 3), ("2024-05-01", 3), ("2024", 0), ("may 2024", 0), ("2024-05", 0), ("100APPLE", 0)],
)
def test_a_folder_in_a_class_is_one_plant_unless_it_is_a_year_or_a_camera(below, groups, tree):
    rows = tree(f"daisy/{below}", "rose")().splits["train"]
    assert len(rows) == 6 and sum(map(bool, rows["group"] if "group" in rows.column_names else [])) == groups


@pytest.mark.parametrize("below", ["2024", "camera 2", "images"])
def test_images_in_a_part_of_a_class_beside_its_masks_are_of_the_class(below, tree):
    source = tree(f"rose/{below}", "rose/masks", "daisy", "oak")()
    assert source.class_names == ["daisy", "oak", "rose"]
    assert [image for image in source.splits["train"]["id"] if "rose" in image] == [
        f"rose/{below}/{n}.png" for n in range(3)
    ]


def test_ood_images_lie_anywhere_and_what_is_not_used_is_said(tree, caplog, monkeypatch):
    tree(*in_each("a"), "b")
    (tree.root / "b/IMG_1.DNG").write_bytes(b"II*\0")
    monkeypatch.setenv("HOME", str(tree.root.parent))
    assert len(load_ood_images(Path("~/my plants"))) == 9
    assert "not used: .dng files: 1 (b/IMG_1.DNG)" in caplog.text
    for path in tree.root.rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="no images found there; not used: .dng files: 1 .*; give a folder of images"):
        load_ood_images(tree.root)


def test_a_folder_above_the_classes_that_is_not_utf8(tree):
    read = tree("Other/oak", "Other/elm", "Family/rose", "Family/daisy")
    os.rename(tree.root / "Family", os.fsencode(tree.root) + b"/Famille\xe9")
    with pytest.raises(UserError, match=r"Famille\\udce9/.*: the path is not UTF-8, which Arrow needs; rename"):
        read()


def test_a_flat_folder_tells_what_else_lies_there(tree):
    read = tree("daisy", at="daisy")
    with pytest.raises(UserError, match="one class of several, --dataset '.*/my plants'"):
        read()
    (tree.root / "daisy/notes.json").write_text("{}")
    with pytest.raises(UserError, match=r"--dataset labels.csv \(notes.json: no such table\)"):
        read()
    (tree.root / "arrays").mkdir()
    (tree.root / "arrays/x.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="no images found, but x.npy; expected"):
        load_source(str(tree.root / "arrays"), Reading("", False, 0, False, None, None))


def test_boxes_beside_one_folder(tree):
    read = tree("JPEGImages")
    (tree.root / "Annotations").mkdir()
    (tree.root / "Annotations/0.xml").write_text("<annotation/>")
    with pytest.raises(UserError, match=r"looks like a detection data set \(boxes in .*0.xml\)"):
        read()


def test_boxes_of_coco_in_the_split_folders(tree):
    read = tree("train", "valid")
    for split in ("train", "valid"):
        images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
        boxes = [{"image_id": number // 2, "category_id": number % 2, "bbox": [0, 0, 1, 1]} for number in range(6)]
        names = [{"id": 0, "name": "weed"}, {"id": 1, "name": "crop"}]
        content = {"images": images, "categories": names, "annotations": boxes}
        (tree.root / split / "_annotations.coco.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"looks like a detection data set \(boxes in .*coco.json\)"):
        read()


def test_a_label_column_is_that_of_a_table_also_beside_class_folders(tree):
    tree("1", "2")
    reading = Reading("", False, 0, False, "genus", None)
    with pytest.raises(UserError, match="--label-column genus: no table of file names and labels lies in .*my plants"):
        load_source(str(tree.root), reading)
    rows = [f"{folder}/{number}.png,{genus}" for folder, genus in (("1", "Rosa"), ("2", "Acer")) for number in range(3)]
    (tree.root / "table.csv").write_text("\n".join(["file,genus", *rows]))
    assert load_source(str(tree.root), reading).class_names == ["Acer", "Rosa"]


def test_names_lie_up_to_three_folders_above_also_of_a_relative_path(tree, monkeypatch):
    tree("ILSVRC/Data/CLS-LOC/n01", "ILSVRC/Data/CLS-LOC/n02")
    (tree.root / "mapping.txt").write_text("n01 tench\nn02 shark\n")
    monkeypatch.chdir(tree.root / "ILSVRC/Data/CLS-LOC")
    assert load_source(".", Reading("", False, 0, False, None, None)).class_names == ["tench", "shark"]


def test_a_folder_named_as_a_copy_is_reported(tree):
    warnings = tree("rose", "rose - Copy", "daisy")().warnings
    assert "'rose - Copy' looks like a copy of 'rose'; if it is one, merge the two" in warnings


def test_backups_and_parts_of_downloads_are_no_images(tree):
    read = tree(*CLASSES)
    for name in ("a.png~", "a.png.bak", "a.png.crdownload"):
        (tree.root / "rose" / name).write_bytes((tree.root / "rose/0.png").read_bytes())
    assert len(read().splits["train"]) == 6


FIVE = ("ash", "elm", "fir", "oak", "yew")


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (FIVE, "class folders: 5"),
        ([f"{split}/{name}" for split in ("train", "valid") for name in FIVE],
         "class folders: 5 in train/; 5 in valid/ (validation)"),
        ([f"{name}/{split}" for split in ("train", "test") for name in FIVE],
         "class folders: 5, with the splits inside each"),
        (["basil/healthy", "basil/diseased", "mint/healthy", "mint/diseased"], "class folders: 4, nested"),
        (["001.Daisy", "002.Rose"], "names without their numbers: 001.Daisy is Daisy"),
        (["tea rose", "tea_rose", "oak"], "'tea rose' and 'tea_rose' are read as one class"),
    ],
)  # fmt: skip
def test_what_the_docs_quote_is_said(folders, said, tree):
    text = (ROOT / "docs/own_images.md").read_text(encoding="utf-8")
    source = tree(*folders)()
    assert f"`{said}" in text
    assert any(said in line for line in [*source.notes, *source.warnings])
