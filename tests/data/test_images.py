"""ImageShards: the same batches at any thread count, from any position, on any number of ranks."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from paperscale.data import ImageShards, augment, jpeg, meanimage, randaugment
from paperscale.data.augment import Draws
from paperscale.data.images import Memory
from paperscale.data.writer import ShardWriter
from paperscale.errors import UserError
from tiny import SIZES, image_of


def module(path, rank=0, world_size=1, **options) -> ImageShards:
    options = {"global_batch_size": 32, "crop_padding": 1, "flip": True, "seed": 5, **options}
    data = ImageShards(str(path), **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


def batches(data: ImageShards, epochs: int = 1) -> list[dict]:
    found = []
    for _ in range(epochs):
        for batch in data.train_dataloader():
            data.consumed = batch["cursor"].consumed
            found.append(batch)
    return found


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in ("image", "label", "sample")
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_do_not_depend_on_the_number_of_threads(tiny_shards, threads):
    alone = batches(module(tiny_shards, num_threads=0), epochs=2)
    assert same(alone, batches(module(tiny_shards, num_threads=threads), epochs=2))


def test_resumable_at_any_batch(tiny_shards):
    whole = batches(module(tiny_shards), epochs=2)
    for cut in range(1, len(whole)):
        resumed = module(tiny_shards)
        resumed.load_state_dict({**resumed.state_dict(), "consumed": whole[cut - 1]["cursor"].consumed})
        assert same(batches(resumed), whole[cut : cut + (8 - cut % 8 if cut % 8 else 8)])


def test_an_epoch_is_every_sample_once_and_the_last_batch_is_short(tiny_shards):
    found = batches(module(tiny_shards))
    assert [len(batch["sample"]) for batch in found] == [32] * 7 + [6]
    assert sorted(torch.cat([batch["sample"] for batch in found]).tolist()) == list(range(SIZES["train"]))
    assert len(module(tiny_shards).train_dataloader()) == 8


@pytest.mark.parametrize(("world_size", "micro"), [(2, None), (3, None), (4, 3), (1, 8)])
def test_every_world_size_gives_the_same_global_batches(tiny_shards, world_size, micro):
    whole = [batch["sample"].tolist() for batch in batches(module(tiny_shards))]
    ranks = [batches(module(tiny_shards, rank, world_size, micro_batch_size=micro)) for rank in range(world_size)]
    got: list[list[int]] = [[]]
    for micro_step in zip(*ranks, strict=True):
        got[-1] += [s for batch in micro_step if batch["cursor"].weight for s in batch["sample"].tolist()]
        if micro_step[0]["cursor"].last:
            got.append([])
    assert got[:-1] == whole
    if micro:
        assert max(len(batch["sample"]) for batch in ranks[0]) <= micro


def test_augmentation_depends_on_seed_epoch_and_sample_alone(tiny_shards):
    def pictures(**options) -> dict[tuple[int, int], bytes]:
        data = module(tiny_shards, **options)
        return {
            ((batch["cursor"].consumed - 1) // SIZES["train"], sample): image.tobytes()
            for batch in batches(data, epochs=2)
            for sample, image in zip(batch["sample"].tolist(), batch["image"].numpy(), strict=True)
        }

    one = pictures()
    assert pictures(global_batch_size=7, num_threads=3) == one
    assert any(one[0, sample] != one[1, sample] for sample in range(SIZES["train"]))
    other_seed = pictures(seed=6)
    assert any(one[0, sample] != other_seed[0, sample] for sample in range(SIZES["train"]))


def test_crops_and_mirrors_are_what_they_say(tiny_shards):
    data = module(tiny_shards)
    seen = set()
    for batch in batches(data):
        for sample, got in zip(batch["sample"].tolist(), batch["image"].numpy(), strict=True):
            image, _ = image_of("train", sample)
            ways = {}
            for flip, source in ((False, image), (True, image[:, ::-1])):
                padded = np.pad(source, 1)
                ways |= {(flip, y, x): padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)}
            matches = [way for way, picture in ways.items() if np.array_equal(picture, got[0])]
            assert matches
            seen.add(matches[0])
    assert len(seen) == 18, "every crop and both mirrorings occur"


def test_evaluation_visits_every_sample_once_without_augmentation(tiny_shards):
    found = [b for rank in range(3) for b in module(tiny_shards, rank, 3, eval_batch_size=7).val_dataloader()]
    assert torch.cat([b["sample"] for b in found]).tolist() == list(range(SIZES["val"]))
    image, label = image_of("val", 20)
    batch = next(b for b in found if 20 in b["sample"])
    at = batch["sample"].tolist().index(20)
    assert np.array_equal(batch["image"][at, 0].numpy(), image)
    assert batch["label"][at] == label


def test_images_are_normalised_by_the_train_split(tiny_shards):
    data = module(tiny_shards)
    batch = next(iter(data.train_dataloader()))
    normalised = data.on_after_batch_transfer(batch, 0)["image"]
    assert torch.allclose(normalised, (batch["image"].float() / 255 - 0.25) / 0.2, atol=1e-6)


@pytest.mark.parametrize("change", [{"seed": 6}, {"global_batch_size": 16}, {"window": 64}, {"train": "val"}])
def test_a_position_in_another_order_is_refused(tiny_shards, change):
    state = module(tiny_shards).state_dict()
    with pytest.raises(UserError, match="cannot be continued"):
        module(tiny_shards, **change).load_state_dict(state)


def test_more_processes_than_samples_in_a_batch(tiny_shards):
    with pytest.raises(UserError, match="use at most 32 processes"):
        module(tiny_shards).accumulate(33)


def test_an_error_in_a_thread_reaches_the_training(own_shards):
    tar = own_shards / "train-000002.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(UserError, match=r"train-000002\.tar"):
        batches(module(own_shards, num_threads=2))


# -- photos: files of many sizes and formats ---------------------------------------------------------------------------

PHOTOS = 24


FORMATS = {"train": ("jpeg", "jpg"), "val": ("png", "png"), "test": ("webp", "webp"), "cut": ("jpeg", "jpeg")}


def photo_sample(of: tuple[str, int]) -> dict:
    split, number = of
    rng = np.random.default_rng(number)
    height, width = 60 + number, 100 - number
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.BICUBIC)
    kind, field = FORMATS[split]
    file = io.BytesIO()
    (image.convert("L") if number % 5 == 0 else image).save(file, kind)
    return {"__key__": f"{number:04d}", field: file.getvalue(), "cls": str(number % 3).encode(), "txt": b"a photo"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    with ShardWriter(folder, "photos", shard_samples=7, num_processes=0, image={"channels": 3}) as writer:
        for split in ("train", "val", "test"):
            writer.write(split, [(split, number) for number in range(PHOTOS)], photo_sample)
    return folder


def content_of(number: int, split: str = "train") -> bytes:
    return photo_sample((split, number))[FORMATS[split][1]]


def pictures(loader) -> dict[int, np.ndarray]:
    """Each sample's image, channels last."""
    found = {}
    for batch in loader:
        found |= dict(zip(batch["sample"].tolist(), batch["image"].movedim(-3, -1).numpy(), strict=True))
    return found


def photo_module(path, **options) -> ImageShards:
    return module(path, **{"global_batch_size": 5, "crop_padding": 0, "size": 32, "resize": 40, **options})


def test_random_resized_crops_are_the_drawn_box_of_the_photo_resized(photos):
    data = photo_module(photos, crop="random_resized", flip=True)
    found = pictures(data.train_dataloader())
    assert sorted(found) == list(range(PHOTOS))
    for number, image in found.items():
        content, draws = content_of(number), Draws(5, 0, number)
        expected = np.empty((32, 32, 3), np.uint8)
        box = augment.random_resized_crop(draws, *jpeg.size(content))
        jpeg.decode_into(content, expected, box, draws(augment.FLIP) < 0.5)
        assert np.array_equal(image, expected)


@pytest.mark.parametrize("crop", ["random_resized", "scale_jitter", "center", "none", "pad"])
def test_photos_do_not_depend_on_threads_ranks_or_batches(photos, crop):
    options = {"crop": crop, "jitter": (36, 50), "flip": True, "color_jitter": "pca", "crop_padding": 3}

    def first_epoch(*ranks, **others):
        found = {}
        for rank in range(*ranks):
            for batch in photo_module(photos, **options, **others, **where(rank, *ranks)).train_dataloader():
                rows = zip(batch["sample"].tolist(), batch["image"], batch["shift"], strict=True)
                found |= {sample: (image.tolist(), shift.tolist()) for sample, image, shift in rows}
        return found

    def where(rank, world_size):
        return {"rank": rank, "world_size": world_size}

    assert first_epoch(1, num_threads=0) == first_epoch(1, num_threads=4) == first_epoch(2, global_batch_size=12)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_central_crop_is_that_of_the_resized_photo(photos, split):
    found = pictures(photo_module(photos, eval_crop="center", val=split).val_dataloader())
    for number, image in found.items():
        photo = Image.open(io.BytesIO(content_of(number, split))).convert("RGB")
        height, width = augment.shorter_side(photo.height, photo.width, 40)
        top, left = round((height - 32) / 2), round((width - 32) / 2)
        expected = np.asarray(photo.resize((width, height), Image.BILINEAR))[top : top + 32, left : left + 32]
        assert np.abs(image.astype(int) - expected).max() <= 1


def test_ten_crops_are_corners_and_centre_and_their_mirror_images(photos):
    batch = next(iter(photo_module(photos, eval_crop="ten", eval_batch_size=6).val_dataloader()))
    assert batch["image"].shape == (6, 10, 3, 32, 32)
    for number, views in zip(batch["sample"].tolist(), batch["image"].movedim(-3, -1).numpy(), strict=True):
        content = content_of(number, "val")
        resized = np.empty((*augment.shorter_side(*jpeg.size(content), 40), 3), np.uint8)
        jpeg.decode_into(content, resized)
        corners = [resized[:32, :32], resized[:32, -32:], resized[-32:, :32], resized[-32:, -32:]]
        for view, corner in zip(views, corners, strict=False):
            assert np.array_equal(view, corner)
        assert np.array_equal(views[5:], views[:5, :, ::-1])
    central = pictures(photo_module(photos, eval_crop="center").val_dataloader())
    assert np.abs(views[4].astype(int) - central[number]).max() <= 1
    normalised = photo_module(photos).on_after_batch_transfer(batch, 0)["image"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (batch["image"].movedim(-3, -1) / 255 - mean) / std
    assert torch.allclose(normalised.movedim(-3, -1), expected, atol=1e-5)


def test_dense_evaluation_gives_whole_photos_at_every_scale(photos):
    data = photo_module(photos, eval_crop="dense", scales=(24, 48), eval_batch_size=5)
    numbers = []
    for batch in data.val_dataloader():
        ready = data.on_after_batch_transfer(batch, 0)
        for number, views in zip(batch["sample"].tolist(), ready["image"], strict=True):
            sizes = [augment.shorter_side(*jpeg.size(content_of(number)), side) for side in (24, 48)]
            assert [tuple(view.shape) for view in views] == [(1, 3, *size) for size in sizes]
            assert all(view.dtype == torch.float32 for view in views)
            numbers.append(number)
    assert numbers == list(range(PHOTOS))


def test_colour_shifts_are_added_on_the_device_before_normalisation_and_not_clipped(photos):
    data = photo_module(photos, crop="none", color_jitter="pca")
    batch = next(iter(data.train_dataloader()))
    plain = data.on_after_batch_transfer({**batch, "shift": torch.zeros_like(batch["shift"])}, 0)["image"]
    shifted = data.on_after_batch_transfer(batch, 0)
    std = torch.tensor([0.229, 0.224, 0.225])
    assert "shift" not in shifted
    for number, shift, difference in zip(
        batch["sample"].tolist(), batch["shift"], shifted["image"] - plain, strict=True
    ):
        expected = torch.tensor(augment.pca_shift(Draws(5, 0, number)))
        assert torch.allclose(shift, expected)
        assert torch.allclose(difference, (expected / 255 / std)[:, None, None].expand_as(difference), atol=1e-5)


def test_batches_lie_in_memory_channels_last(photos):
    data = photo_module(photos, crop="random_resized", eval_crop="center")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        image = data.on_after_batch_transfer(batch, 0)["image"]
        assert image.is_contiguous(memory_format=torch.channels_last)


def test_memory_is_used_again_only_once_nothing_refers_to_it():
    memory = Memory()
    first = memory.take((4, 8, 8, 3))
    view = first.movedim(-1, -3)[1:]
    address = first.data_ptr()
    assert memory.take((4, 8, 8, 3)).data_ptr() != address
    del first
    assert memory.take((4, 8, 8, 3)).data_ptr() != address, "a view still refers to it"
    del view
    held = [memory.take((4, 8, 8, 3)) for _ in range(3)]
    assert address in [tensor.data_ptr() for tensor in held]
    assert len({tensor.data_ptr() for tensor in held}) == 3
    del held
    memory.take((2, 8, 8, 3))
    assert len(memory._blocks) == 1, "blocks of another size are given up"
    assert pickle.loads(pickle.dumps(memory))._blocks == []


@pytest.mark.parametrize("eval_crop", ["center", "dense"])
def test_a_photo_that_does_not_decode_is_named_or_left_out(photos, tmp_path, eval_crop, capsys):
    with ShardWriter(tmp_path, "cut", shard_samples=7, num_processes=0, image={"channels": 3}) as writer:
        for split in ("train", "val"):
            writer.write(split, [("cut", number) for number in range(PHOTOS)], cut_sample)
    with pytest.raises(UserError, match=r"train-.*\.tar: sample '0004'.* does not decode: "):
        batches(photo_module(tmp_path, crop="center"))
    data = photo_module(tmp_path, crop="center", eval_crop=eval_crop, on_fault="skip")
    found = batches(data)
    assert sorted(torch.cat([batch["sample"] for batch in found]).tolist()) == [n for n in range(PHOTOS) if n != 4]
    assert all(batch["image"].is_contiguous(memory_format=torch.channels_last) for batch in found)
    (batch,) = data.val_dataloader()
    assert len(batch["image"]) == len(batch["label"]) == PHOTOS - 1
    assert "left out of the evaluation" in capsys.readouterr().err


def cut_sample(of: tuple[str, int]) -> dict:
    sample = photo_sample(of)
    return {**sample, "jpeg": sample["jpeg"][:-600]} if of[1] == 4 else sample


def test_labels_may_be_of_another_field_or_absent(photos):
    batch = next(iter(photo_module(photos, label=None).train_dataloader()))
    assert "label" not in batch
    with pytest.raises(UserError, match=r"has no labels in data\.label=fine, only the fields"):
        batches(photo_module(photos, label="fine"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "random_resize"}, "choose pad, random_resized.*did you mean 'random_resized'"),
        ({"eval_crop": "tenn"}, "did you mean 'ten'"),
        ({"color_jitter": "hue"}, "data.color_jitter=hue: choose pca"),
        ({"max_reduction": 3}, "data.max_reduction=3: choose 1, 2, 4, 8"),
        ({"crop": "scale_jitter", "jitter": (20, 50)}, "data.size=32 or more: raise it"),
        ({"eval_crop": "center", "resize": 30}, "raise data.resize"),
        ({"crop": "random_resized", "size": None}, "data.crop=random_resized needs a size: set data.size"),
        ({"auto_augment": "random"}, "data.auto_augment=random: choose rand"),
        ({"rand_magnitude": 31}, "give a magnitude from 0 to 30"),
        ({"erase": 10}, "data.erase=10 is a probability: give 0 to 1"),
        ({"normalize": "pixels"}, "choose channel, pixel.*did you mean 'pixel'"),
        ({"normalize": "pixel", "crop": "center"}, "data.crop=center takes parts.* set data.crop=none, or train with"),
        ({"normalize": "pixel", "eval_size": 40}, "data.eval_size=40 is not the size .* set data.eval_size=null, or"),
        ({"normalize": "pixel", "eval_crop": "center"}, "^data.eval_crop=center takes .* set data.eval_crop=none, or"),
        ({"eval_crop": "center", "eval_size": 41}, "data.resize=40 is less than data.eval_size=41: raise data.resize"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(photos, options, message):
    with pytest.raises(UserError, match=message):
        photo_module(photos, **options)


def test_images_of_many_sizes_need_a_size(photos):
    with pytest.raises(UserError, match=r"differ in size: set data.size"):
        batches(photo_module(photos, size=None))
    with pytest.raises(UserError, match=r"differ in size: set data.size=?.* or data\.normalize=channel$"):
        batches(photo_module(photos, size=None, normalize="pixel"))


def test_training_and_evaluation_may_have_different_resolutions(photos):
    data = photo_module(photos, crop="random_resized", size=24, eval_crop="center", eval_size=32)
    assert next(iter(data.train_dataloader()))["image"].shape == (5, 3, 24, 24)
    found = pictures(data.val_dataloader())
    expected = pictures(photo_module(photos, eval_crop="center").val_dataloader())
    assert all(np.array_equal(found[number], expected[number]) for number in range(PHOTOS))
    whole = photo_module(photos, crop="none", size=24, eval_size=32)
    assert next(iter(whole.val_dataloader()))["image"].shape[-2:] == (32, 32)


# -- normalisation by the mean image, erasing --------------------------------------------------------------------------


def test_the_mean_image_is_subtracted_before_images_are_mirrored_padded_and_cropped(own_shards):
    images = np.stack([image_of("train", number)[0] for number in range(SIZES["train"])]) / 255
    mean = images.mean(0)
    data = module(own_shards, crop_padding=2, normalize="pixel")
    seen = set()
    for batch in data.train_dataloader():
        places = batch["place"].tolist()
        ready = data.on_after_batch_transfer(batch, 0)
        assert "place" not in ready
        for sample, (top, left, flip), got in zip(batch["sample"].tolist(), places, ready["image"], strict=True):
            centred = images[sample] - mean
            expected = np.pad(centred[:, ::-1] if flip else centred, 2)[top : top + 8, left : left + 8]
            assert np.abs(got[0].numpy() - expected).max() < 1e-6
            seen.add((top, left, flip))
    assert len(seen) > 40
    batch = next(iter(data.val_dataloader()))
    got = data.on_after_batch_transfer(batch, 0)["image"]
    assert torch.allclose(got, batch["image"] / 255 - torch.from_numpy(mean).float(), atol=1e-6)


def test_the_mean_image_is_kept_beside_the_set_and_made_again_where_it_is_damaged(own_shards):
    def normalised() -> torch.Tensor:
        data = module(own_shards, normalize="pixel")
        return data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)["image"]

    first = normalised()
    (kept,) = own_shards.glob("mean-*.npy")
    np.save(kept, np.load(kept) + 255)
    assert torch.allclose(normalised(), first - 1, atol=1e-6), "it is read"
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(normalised(), first)
    assert np.load(kept).shape == (1, 8, 8)


def test_the_mean_of_a_large_set_is_over_blocks_at_even_distances():
    assert meanimage.blocks(600, 64, 64) == [(0, 250), (250, 500), (500, 600)]
    large = meanimage.blocks(1_281_167, 64, 64)
    assert sum(stop - start for start, stop in large) == 60_000
    assert large[-1][0] > 1_270_000
    assert meanimage.blocks(10_000, 5000, 5000) == [(0, 250)]


def test_a_share_of_the_images_has_a_box_erased(tiny_shards):
    data, whole = module(tiny_shards, erase=0.25), module(tiny_shards)
    erased = []
    for batch, plain in zip(data.train_dataloader(), whole.train_dataloader(), strict=True):
        ready = data.on_after_batch_transfer(batch, 0)["image"]
        plain = whole.on_after_batch_transfer(plain, 0)["image"]
        for sample, got, image in zip(batch["sample"].tolist(), ready[:, 0], plain[:, 0], strict=True):
            top, left, height, width = augment.erased(Draws(5, 0, sample), 8, 8, 0.25)
            image[top : top + height, left : left + width] = 0
            assert torch.equal(got, image)
            erased.append(height * width / 64)
    boxes = [share for share in erased if share]
    assert 0.15 < len(boxes) / len(erased) < 0.35
    assert min(boxes) < 0.1
    assert 0.3 < max(boxes) < 0.5


def test_rand_augment_changes_training_images_alone(photos):
    plain, changed = photo_module(photos, crop="none"), photo_module(photos, crop="none", auto_augment="rand")
    before, after = pictures(plain.train_dataloader()), pictures(changed.train_dataloader())
    for number, image in before.items():
        randaugment.rand_augment(image, Draws(5, 0, number))
        assert np.array_equal(after[number], image)
    before, after = pictures(plain.val_dataloader()), pictures(changed.val_dataloader())
    assert all(np.array_equal(after[number], image) for number, image in before.items())


def test_sets_without_images_or_labels_are_refused_at_the_start(tmp_path, tiny_shards):
    with ShardWriter(tmp_path, "stereo", image={"height": 8, "width": 8}) as writer:
        writer.write("train", [{"__key__": str(n), "left.png": b"x", "name": b"cat"} for n in range(9)])
    with pytest.raises(
        UserError, match=r"has no images in jpg, jpeg, png, webp, only the fields \['left\.png', 'name'\]"
    ):
        ImageShards(str(tmp_path), 4, val=None).train_dataloader()
    with pytest.raises(UserError, match=r"has no labels in data\.label=cls, only the fields"):
        ImageShards(str(tmp_path), 4, val=None, image_field="left.png").train_dataloader()
    with pytest.raises(UserError, match=r"has no labels in data\.label=clss.*did you mean 'cls'"):
        ImageShards(str(tiny_shards), 4, val=None, label="clss").train_dataloader()


def test_labels_may_be_names_of_classes(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "png")
    facts = {"height": 8, "width": 8, "channels": 1}
    with ShardWriter(tmp_path, "names", image=facts, classes=["cat", "dog"]) as writer:
        names = ["dog", "cat", "1"]
        writer.write("train", [{"__key__": str(n), "png": file.getvalue(), "cls": c} for n, c in enumerate(names)])
    batch = next(iter(ImageShards(str(tmp_path), 3, val=None).train_dataloader()))
    assert dict(zip(batch["sample"].tolist(), batch["label"].tolist(), strict=True)) == {0: 1, 1: 0, 2: 1}


@pytest.mark.parametrize(
    "arguments", [{"scale": (1.0, 0.08)}, {"scale": (0, 0)}, {"ratio": (-1, 2)}, {"size": 0}, {"crop_padding": -1}]
)
def test_numbers_that_make_no_sense_are_refused(tiny_shards, arguments):
    with pytest.raises(UserError, match=f"data.{next(iter(arguments))}"):
        ImageShards(str(tiny_shards), **arguments)
