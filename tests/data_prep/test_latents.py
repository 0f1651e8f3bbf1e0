"""The latent cache: what it holds is what the models say, whatever the order or number of processes; broken files mend."""

import pytest
import torch

from trfpp.data_prep import latents
from trfpp.data_prep.dataset import clip_frames, load_clips, prepare
from trfpp.data_prep.frames import to_tensor
from trfpp.data_prep.latents import CacheKey, build_cache, check_cache, find_cache, finish_cache, read_clip
from trfpp.data_prep.procedural import write_world
from trfpp.trf.base import load_component
from trfpp.trf.conditioning import encode_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    write_world(root / "videos", "linear", count=2, seed=0, num_frames=9, side=64)
    prepare(root / "videos", root / "data", fps=None, num_frames=4, height=32, width=48, holdout=0.4, progress=False)
    return root / "data"


@pytest.fixture(scope="module")
def key(tiny_model):
    return CacheKey(model=str(tiny_model), augmentations=3)


@pytest.fixture(scope="module")
def cache(data, key):
    folder = build_cache(data, key, progress=False)
    finish_cache(data, key)
    return folder


def clip_of(data, split="train"):
    return load_clips(data, split)[0]


def test_latents_are_the_posterior_and_conditions_the_mode_of_the_noised_bound(data, cache, key, tiny_model):
    clip = clip_of(data)
    cached = read_clip(cache, clip["clip_id"])
    vae = load_component(tiny_model, "vae")
    frames = to_tensor(clip_frames(clip))
    with torch.no_grad():
        posterior = vae.encode(frames).latent_dist
    assert torch.allclose(cached["mean"], posterior.mean, atol=1e-5)
    assert torch.allclose(cached["std"], posterior.std, atol=1e-5)
    for bound, frame in (("start", frames[:1]), ("end", frames[-1:])):
        assert cached[f"{bound}.condition"].shape == (3, *posterior.mean.shape[1:])
        # The noise is not kept, but its strength shows: encodings at a smaller sigma lie nearer the clean one.
        with torch.no_grad():
            clean = vae.encode(frame).latent_dist.mode()[0]
        distances = (cached[f"{bound}.condition"] - clean).flatten(1).norm(dim=1)
        assert distances.argsort().tolist() == cached[f"{bound}.noise_aug"].argsort().tolist()
        assert len(set(cached[f"{bound}.noise_aug"].tolist())) == 3


def test_without_augmentation_noise_the_condition_is_exactly_the_mode(data, tiny_model):
    key = CacheKey(model=str(tiny_model), augmentations=1, noise_aug_mean=-40.0, noise_aug_std=0.0)
    cached = read_clip(build_cache(data, key, progress=False), clip_of(data)["clip_id"])
    with torch.no_grad():
        mode = load_component(tiny_model, "vae").encode(to_tensor(clip_frames(clip_of(data)))[:1]).latent_dist.mode()
    assert torch.allclose(cached["start.condition"], mode, atol=1e-5)


def test_clip_sees_the_clean_frame(data, cache, tiny_model):
    cached = read_clip(cache, clip_of(data)["clip_id"])
    frames = to_tensor(clip_frames(clip_of(data)))
    encoder, extractor = (load_component(tiny_model, name) for name in ("image_encoder", "feature_extractor"))
    for bound, frame in (("start", frames[:1]), ("end", frames[-1:])):
        clean = encode_clip((frame + 1) / 2, encoder, extractor)[0]
        assert torch.allclose(cached[f"{bound}.embedding"], clean, atol=1e-5)


def test_shares_make_the_same_files_as_one_process(data, cache, key, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "cache_folder", lambda *_: tmp_path)
    for share in ((1, 2), (0, 2)):
        build_cache(data, key, share=share, progress=False)
    files = sorted(path.name for path in cache.glob("*.safetensors"))
    assert files == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for name in files:
        assert (cache / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_truncated_file_is_encoded_again(data, cache, key):
    file = next(iter(sorted(cache.glob("*.safetensors"))))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    (cache / latents.INDEX_FILE).unlink()
    build_cache(data, key, progress=False)
    finish_cache(data, key)
    assert file.read_bytes() == whole


def test_a_cache_is_found_for_its_model_only(data, cache, tiny_model):
    assert find_cache(data, str(tiny_model)) == cache
    assert find_cache(data, "miniature") is None


def test_two_caches_for_one_model_must_be_chosen_between(data, cache, tiny_model):
    other = CacheKey(model=str(tiny_model), augmentations=1)
    folder = build_cache(data, other, progress=False)
    finish_cache(data, other)
    with pytest.raises(ValueError, match="choose one with cache="):
        find_cache(data, str(tiny_model))
    (folder / latents.INDEX_FILE).unlink()


def test_a_missing_clip_is_named(cache):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_clip(cache, "nowhere")


def test_an_explicit_cache_must_be_complete_and_for_the_model(cache, tiny_model, tmp_path):
    check_cache(cache, str(tiny_model))
    with pytest.raises(ValueError, match="no complete cache"):
        check_cache(tmp_path, str(tiny_model))
    with pytest.raises(ValueError, match="another model, which differs in model"):
        check_cache(cache, "miniature")


def test_versions_of_libraries_are_no_part_of_a_cache(key):
    assert not any("version" in name for name in key.content()["image_encoder"])
