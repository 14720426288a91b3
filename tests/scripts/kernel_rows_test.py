"""The joining of GPU benches with their peers, on rows made up, and the script around it."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import kernel_rows

SCRIPT = pathlib.Path(kernel_rows.__file__).with_name("run_gpu_kernels")


def ours(case, us, **more):
    return {"case": case, "ours_us": us, **more}


def peer(case, us, **more):
    return {"case": case, "peer": "a peer", "peer_us": us, **more}


def joined(own, peers=(), ceilings=None):
    return {row["case"]: row for row in kernel_rows.join(list(own), list(peers), ceilings or {})}


class JoinTest(unittest.TestCase):
    def test_ratio_is_peer_by_ours(self):
        row = joined([ours("prefill/d128/8k", 100.0)], [peer("prefill/d128/8k", 350.0)])
        self.assertEqual(row["prefill/d128/8k"]["ratio"], 3.5)
        self.assertTrue(row["prefill/d128/8k"]["met"])

    def test_one_case_of_ours_against_two_peers_keeps_a_row_of_its_own(self):
        rows = joined([ours("decode_b1/d128/8k", 4.0)],
                      [peer("decode_fastdms/d128_b1", 6.0, ours_case="decode_b1/d128/8k")])
        self.assertEqual(rows["decode_fastdms/d128_b1"]["ratio"], 1.5)
        self.assertFalse(rows["decode_fastdms/d128_b1"]["met"])
        self.assertNotIn("ours_case", rows["decode_fastdms/d128_b1"])
        self.assertEqual(rows["decode_b1/d128/8k"]["ratio"], 4.0)
        self.assertTrue(rows["decode_b1/d128/8k"]["met"])

    def test_a_peer_without_ours_gives_no_row(self):
        self.assertEqual(joined([], [peer("prefill/d64/8k", 1.0)]), {})

    def test_compaction_becomes_a_share(self):
        rows = joined([ours("prefill/d128/32k", 200.0, compact_us=14.0, compact_bytes=4e6)])
        self.assertEqual(rows["compact/d128/32k"]["ratio"], 0.07)
        self.assertFalse(rows["compact/d128/32k"]["met"])

    def test_cases_against_our_own(self):
        rows = joined([ours("prefill/d64/8k", 100.0), ours("prefill_mixed/d64/8k", 109.0),
                       ours("prefill/d128/32k", 260.0), ours("prefill_fp8/d128/32k", 200.0),
                       ours("decode_balanced", 50.0), ours("decode_imbalance", 53.0)])
        self.assertAlmostEqual(rows["prefill_mixed/d64/8k"]["ratio"], 1.09)
        self.assertTrue(rows["prefill_mixed/d64/8k"]["met"])
        self.assertAlmostEqual(rows["prefill_fp8/d128/32k"]["ratio"], 1.3)
        self.assertNotIn("met", rows["prefill_fp8/d128/32k"])  # a goal alone
        self.assertFalse(rows["decode_imbalance"]["met"])

    def test_a_bench_that_times_its_peer(self):
        own, peers, _, _ = kernel_rows.sort_lines(
            [ours("prefill/d128/32k", 260.0),
             ours("prefill_fp8/d128/32k", 200.0, peer="the same kernel in BF16", peer_us=250.0)])
        row = joined(own, peers)["prefill_fp8/d128/32k"]
        self.assertEqual((row["ratio"], row["peer"]), (1.25, "the same kernel in BF16"))

    def test_shares_of_the_read_stream(self):
        rows = joined([ours("decode_bw", 10.0, limit_us=8.5),
                       ours("gemv/llama_1b_gate_up_fp8/m1", 10.0, limit_us=7.4)])
        self.assertAlmostEqual(rows["decode_bw"]["ratio"], 85.0)
        self.assertTrue(rows["decode_bw"]["met"])
        self.assertEqual(rows["gemv/llama_1b_gate_up_fp8/m1"]["must"], ">= 75")
        self.assertFalse(rows["gemv/llama_1b_gate_up_fp8/m1"]["met"])

    def test_limit_is_the_slower_of_work_and_bytes(self):
        ceilings = {"gemm_tflops": 500.0, "copy_gbps": 2000.0}
        ceilings["gemm_fp8_tflops"] = 1000.0
        rows = joined([ours("a", 10.0, flop=1e9, bytes=1e7), ours("b", 10.0, flop=4e9, bytes=1e7),
                       ours("c", 10.0), ours("d", 10.0, flop_fp8=6e9)], (), ceilings)
        self.assertEqual([rows[c].get("limit_us") for c in "abcd"], [5.0, 8.0, None, 6.0])
        self.assertEqual((rows["d"]["peer"], rows["d"]["ratio"]), ("the limit", 0.6))
        self.assertNotIn("peer", rows["c"])
        self.assertEqual(rows["b"]["pct_of_limit"], 80.0)

    def test_lines_are_told_apart(self):
        own, peers, ceilings, failed = kernel_rows.sort_lines(
            [{"ceilings": {"gemm_tflops": 1.0}}, {"case": "read_stream", "gbs": 3000.0},
             ours("a", 1.0), peer("a", 2.0), {"failed": "mo: no"}, {"head": {}}, {"odd": 1}])
        self.assertEqual((len(own), len(peers), failed), (1, 1, ["mo: no", '{"odd": 1}']))
        self.assertEqual(ceilings, {"gemm_tflops": 1.0, "read_gbps": 3000.0})

    def test_the_median_round_stands(self):
        own, peers, _, _ = kernel_rows.sort_lines(
            [ours("a", 3.0, compact_us=30), peer("b", 5.0), ours("a", 1.0, compact_us=10),
             peer("b", 4.0), ours("a", 2.0, compact_us=20)])
        self.assertEqual(own, [ours("a", 2.0, compact_us=20)])
        self.assertEqual(peers, [peer("b", 4.0)])

    def test_missing_names_every_case_of_the_table(self):
        self.assertEqual(kernel_rows.missing([]), sorted(kernel_rows.BARS))
        self.assertNotIn("decode_bw", kernel_rows.missing(kernel_rows.join(
            [ours("decode_bw", 10.0, limit_us=1.0)], [], {})))

    def test_the_table_marks_what_is_missed(self):
        lines = kernel_rows.table(kernel_rows.join(
            [ours("prefill/d128/8k", 100.0), ours("prefill/d128/32k", 100.0)],
            [peer("prefill/d128/8k", 339.0), peer("prefill/d128/32k", 580.0)], {}))
        self.assertEqual([("MISSED" in line) for line in lines], [False, False, True])


class ScriptTest(unittest.TestCase):
    def setUp(self):
        temp = tempfile.TemporaryDirectory()
        self.addCleanup(temp.cleanup)
        self.dir = pathlib.Path(temp.name)

    def bench(self, name, *lines, status=0, commit="abc"):
        path = self.dir / name
        text = "".join(f"echo '{line}'\n" for line in lines)
        path.write_text(f"#!/bin/sh\n# winnow bench built from {commit}\n{text}exit {status}\n",
                        encoding="utf-8")
        path.chmod(0o755)

    def run_script(self, *args):
        return subprocess.run(
            [sys.executable, "-B", SCRIPT, "--bin", self.dir, "--out", self.dir / "out.json",
             "--commit", "abc", *args],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": "/usr/bin:/bin"})

    def test_a_run(self):
        self.bench("compact_decode_bench", json.dumps({"case": "read_stream", "gbs": 4000}),
                   "a note", json.dumps(ours("decode_bw", 10.0, limit_us=9.0)))
        result = self.run_script("--only", "compact_decode", "--allow-missing")
        self.assertEqual(result.returncode, 0, result.stderr)
        written = json.loads((self.dir / "out.json").read_text())
        self.assertEqual(written["commit"], "abc")
        self.assertEqual(written["command"],
                         "bench/run_gpu_kernels --only compact_decode --rounds 3")
        self.assertEqual(result.stderr.count("a note"), 3)
        self.assertEqual(written["ceilings"], {"read_gbps": 4000})
        self.assertEqual([(r["case"], r["ratio"]) for r in written["rows"]], [("decode_bw", 90.0)])
        self.assertIn("prefill/d128/8k", written["missing"])
        self.assertFalse((self.dir / "out.json.part").exists())

    def halves(self, *commits):
        paths = [self.dir / "a.part", self.dir / "b.part"]
        for path, commit, line in zip(paths, commits, (ours("prefill/d64/8k", 10.0),
                                                       peer("prefill/d64/8k", 35.0))):
            path.write_text(json.dumps({"head": {"date": "today", "gpu": "g", "commit": commit}})
                            + "\n" + json.dumps(line) + "\n", encoding="utf-8")
        return paths

    def test_halves_are_joined(self):
        result = self.run_script("--allow-missing", "--join", *self.halves("abc", "abc"))
        self.assertEqual(result.returncode, 0, result.stderr)
        written = json.loads((self.dir / "out.json").read_text())
        self.assertEqual((written["commit"], written["rows"][0]["ratio"]), ("abc", 3.5))

    def test_halves_of_two_commits_are_not(self):
        result = self.run_script("--allow-missing", "--join", *self.halves("abc", "abd"))
        self.assertEqual(result.returncode, 2)
        self.assertIn("commit differs: ['abc', 'abd']", result.stderr)
        self.assertFalse((self.dir / "out.json").exists())

    def test_a_part_without_a_head_is_named(self):
        part = self.dir / "a.part"
        part.write_text(json.dumps(ours("decode_bw", 10.0)) + "\n", encoding="utf-8")
        result = self.run_script("--allow-missing", "--join", part)
        self.assertEqual(result.returncode, 2)
        self.assertIn("none of the parts has a head", result.stderr)

    def test_missing_cases_fail(self):
        self.bench("compact_decode_bench", json.dumps(ours("decode_bw", 10.0, limit_us=9.0)))
        self.assertEqual(self.run_script("--only", "compact_decode").returncode, 1)

    def test_a_part_that_is_not_built_stops_it(self):
        result = self.run_script("--only", "compact_decode", "--allow-missing")
        self.assertEqual(result.returncode, 2)
        self.assertFalse((self.dir / "out.json").exists())

    def test_a_bench_of_another_commit_stops_it(self):
        for commit in ("abd", "abc-dirty"):
            self.bench("compact_decode_bench", json.dumps(ours("decode_bw", 10.0)), commit=commit)
            result = self.run_script("--only", "compact_decode", "--allow-missing")
            self.assertEqual(result.returncode, 2)
            self.assertIn(f"was built from {commit}, not abc", result.stderr)
            self.assertFalse((self.dir / "out.json").exists())

    def test_a_bench_that_does_not_know_its_commit_runs(self):
        self.bench("compact_decode_bench", json.dumps(ours("decode_bw", 10.0)), commit="unknown")
        result = self.run_script("--only", "compact_decode", "--allow-missing")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("abc is not checked", result.stderr)

    def test_a_part_that_fails_leaves_the_others_rows(self):
        self.bench("compact_decode_bench", json.dumps(ours("decode_bw", 10.0, limit_us=9.0)))
        self.bench("dms_prefill_bench", json.dumps(ours("prefill/d64/8k", 10.0)), status=3)
        result = self.run_script("--only", "compact_decode,dms_prefill_bench", "--allow-missing")
        self.assertEqual(result.returncode, 2)
        self.assertIn("dms_prefill_bench: exit status 3", result.stderr)
        self.assertEqual(len(json.loads((self.dir / "out.json").read_text())["rows"]), 2)


if __name__ == "__main__":
    unittest.main()
