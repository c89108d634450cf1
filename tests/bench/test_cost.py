"""The cost page's arithmetic: hours from seconds, computed parts beside the roofline's analysis."""

import pytest

from worldloop.bench import cost
from worldloop.bench.roofline import H200, Pass, Rates, dit_pass
from worldloop.bench.worlds import bench_config, meta_world, vae_flops


def test_hours_of_a_part():
    # 100 steps x 64 episodes x 12 chunks = 76,800 chunks.
    assert cost.Part("x", 1.0, "").hours(64) == pytest.approx(76_800 / 3600)


def test_a_pass_takes_the_sum_of_its_parts():
    rates = Rates(gemm=10.0, attention=5.0, vae=1.0, copy=2.0)
    assert Pass(gemm=20, attention=10, moved=4).seconds(rates) == pytest.approx(2 + 2 + 2)


def test_the_2b_pass_is_that_of_the_analysis():
    """performance.md, section 1: 256x256, window of 1 + 12: 5.05 - 0.7 (cross) GEMM, 1.71 self."""
    one = dit_pass(bench_config("2b", (256, 256)), 6, 13, 1, 2)
    assert one.attention == pytest.approx(1.71e12, rel=0.01)
    assert one.gemm == pytest.approx(4.33e12, rel=0.01)
    assert 1e3 * one.seconds(H200) == pytest.approx(10.2, rel=0.05)


def test_vae_flops_of_the_published_autoencoder():
    world = meta_world(bench_config("2b", (256, 256)))
    assert vae_flops(world, "decode") == pytest.approx(13.3e12, rel=0.01)
    assert vae_flops(world, "encode_chunk") == pytest.approx(7.9e12, rel=0.01)


def document(arms):
    return {
        "bench": "rollout", "preset": "tiny", "picture": [128, 128], "arms": arms,
        "machine": {"gpu": None, "cpu": "x", "threads": 2}, "backend": "eager",
    }  # fmt: skip


def test_measured_parts_take_the_best_batch_and_say_where_from():
    arms = [
        {"arm": "C4", "batch": 1, "p50_s": 0.5, "frames_per_s": 48.0},
        {"arm": "C4", "batch": 4, "p50_s": 1.0, "frames_per_s": 96.0},
        {"arm": "C4", "batch": 8, "out_of_memory": True},
    ]
    policy = {"bench": "policy", "preset": "tiny", "ms_per_observation_with_image_chain": 10.0,
              "machine": {"gpu": None}}  # fmt: skip
    compiled = document([dict(arms[0], p50_s=0.1)]) | {"backend": "compiled"}
    found = cost.measured({"rollout-tiny-128x128-cpu.json": document(arms),
                           "rollout-tiny-128x128-compiled-cpu.json": compiled,
                           "policy-tiny-cpu.json": policy}, "cpu")  # fmt: skip
    assert [part.seconds for part in found["tiny, 128x128, compiled"]][0] == 0.1
    world, forward, update = found["tiny, 128x128, eager"]
    assert world.seconds == 0.25 and "batch 4" in world.name
    assert world.source == "measured: rollout-tiny-128x128-cpu.json"
    assert forward.seconds == 0.01 and update.seconds == pytest.approx(0.03)
    assert update.source.startswith("computed")
    assert cost.measured({"rollout-tiny-128x128-cpu.json": document(arms)}, "gpu") == {}


def test_totals_add_one_world_and_the_policy():
    parts = [cost.Part("world model, 4 steps (C4p)", 1.0, ""), cost.Part("policy forward", 0.5, ""),
             cost.Part("world model, as published (A0)", 9.0, "")]  # fmt: skip
    assert cost.total_hours(parts, "world model, 4 steps (C4p)", 64) == pytest.approx(
        1.5 * 76_800 / 3600
    )
