"""Joins rows of the GPU benches with rows of their peers, and holds them against the bars.

A bench's row has `case`, `ours_us` and either `limit_us` or the work that must be done, `flop` (or
`flop_fp8`, on the tensor cores' FP8 rate) and `bytes`, and may time a `peer` itself; a peer's row
has `case`, `peer`, `peer_us` and, where one measurement of ours stands against several peers,
`ours_case`. A joined row has `ratio`, the number that the case's bar is about: the peer's time by
ours, unless OWN_PEERS or RATIO_FIELDS names it. What nobody else is timed at has its limit as the
peer.
"""
import json
import re

# How `ratio` must compare, the cases, and for each of them the bar and the goal ("-": none).
TABLE = (
    (">=", "prefill/d128/{}", "8k 32k 128k", "3.4 5.8 7.5", "4.2 6.6 8.6"),
    (">=", "prefill/d64/{}", "8k 32k 128k", "3.4 5.8 7.0", "4.0 6.5 7.8"),
    (">=", "prefill_proto/d128/{}", "8k 32k 128k", "1.2 1.15 1.05", "1.4 1.3 1.2"),
    (">=", "prefill_proto/d64/{}", "8k 32k 128k", "1.2 1.15 1.05", "1.4 1.3 1.2"),
    (">=", "prefill_keep35/d128/{}", "8k 32k 128k", "1.9 2.3 2.5", "2.2 2.6 2.9"),
    (">=", "prefill_keep35/d64/{}", "8k 32k 128k", "1.9 2.3 2.5", "2.2 2.6 2.9"),
    (">=", "prefill_w512/d128/{}", "32k", "4.8", "5.6"),
    (">=", "prefill_mo/d128/{}", "8k 32k 128k", "5 3.3 1.75", "6 3.8 2.1"),
    (">=", "prefill_triton/{}/32k", "d128 d64", "15 16", "18 19"),
    (">=", "prefill_hub/d128/{}", "8k", "-", "-"),
    (">=", "prefill_dense/d128/{}", "8k 32k", "0.85 0.85", "0.95 0.95"),
    (">=", "prefill_fp8/d128/{}", "32k 128k", "- -", "1.3 1.3"),
    ("<=", "prefill_mixed/d64/{}", "8k", "1.10", "1.03"),
    ("<=", "compact/d128/{}", "32k", "0.06", "0.04"),
    (">=", "{}", "decode_bw", "85", "92"),
    ("<=", "{}", "decode_imbalance", "1.05", "1.02"),
    ("<=", "decode_b1/d128/{}", "8k", "8", "5"),
    (">=", "decode_flashinfer/{}", "128k_b1 32k_b8", "5 5.5", "6 7"),
    (">=", "decode_fastdms/{}", "d64_b1 d64_b8 d128_b1 d128_b8", "2 2 2 2", "3 3 3 3"),
    (">=", "gemv/{}/m1", "qwen3_8b_gate_up_bf16 qwen3_8b_gate_up_fp8 qwen3_8b_down_bf16 "
     "qwen3_8b_down_fp8 llama_1b_gate_up_bf16 llama_1b_gate_up_fp8",
     "85 85 85 85 85 75", "92 92 92 92 92 85"),
    (">=", "gemv/{}/m16", "qwen3_8b_gate_up_bf16 qwen3_8b_gate_up_fp8 qwen3_8b_down_bf16 "
     "qwen3_8b_down_fp8 llama_1b_gate_up_bf16 llama_1b_gate_up_fp8",
     "85 85 85 85 85 75", "92 92 92 92 92 85"),
)

# Cases that stand against another case of ours, and whether `ratio` is this one's time by that
# one's ("time") or the inverse ("speed").
OWN_PEERS = {
    "prefill_mixed/d64/8k": ("prefill/d64/8k", "time"),
    "decode_imbalance": ("decode_balanced", "time"),
    "prefill_fp8/d128/32k": ("prefill/d128/32k", "speed"),
    "prefill_fp8/d128/128k": ("prefill/d128/128k", "speed"),
}
# Cases, as regular expressions, whose `ratio` is another field of the row.
RATIO_FIELDS = (("decode_bw(/.*)?", "pct_of_limit"), ("gemv/.*", "pct_of_limit"),
                ("decode_b1/.*", "ours_us"))


def read_bars():
    """{case: (operator, bar or None, goal or None)}."""
    number = lambda text: None if text == "-" else float(text)
    bars = {}
    for operator, case, parts, musts, goals in TABLE:
        for part, must, goal in zip(parts.split(), musts.split(), goals.split(), strict=True):
            bars[case.format(part)] = (operator, number(must), number(goal))
    return bars


BARS = read_bars()


def meets(operator, value, bar):
    return value >= bar if operator == ">=" else value <= bar


def limit_us(row, ceilings):
    """The least time that the row's work could take in this run, or None."""
    if "limit_us" in row:
        return row["limit_us"]
    limits = [row[work] / ceilings[ceiling] / scale for work, ceiling, scale in (
        ("flop", "gemm_tflops", 1e6), ("flop_fp8", "gemm_fp8_tflops", 1e6),
        ("bytes", "copy_gbps", 1e3)) if work in row and ceiling in ceilings]
    return max(limits, default=None)


def sort_lines(lines):
    """What a run printed, as rows of ours and of peers, one a case, ceilings, and failures."""
    ours, peers, ceilings, failed = [], [], {}, []
    for line in lines:
        if "ours_us" in line:
            ours.append(line)
        elif "peer_us" in line:
            peers.append(line)
        elif "ceilings" in line:
            ceilings.update(line["ceilings"])
        elif line.get("case") == "read_stream":
            ceilings["read_gbps"] = line["gbs"]
        elif "head" not in line:
            failed.append(line.get("failed") or json.dumps(line))
    return middle(ours, "ours_us"), middle(peers, "peer_us"), ceilings, failed


def middle(rows, field):
    """Of each case the row whose `field` is the median of its rounds (the lower of two)."""
    rounds = {}
    for row in rows:
        rounds.setdefault(row["case"], []).append(row)
    return [sorted(group, key=lambda row: row[field])[(len(group) - 1) // 2]
            for group in rounds.values()]


def compact_shares(ours):
    """Rows of what the compaction takes of each sparse prefill."""
    return [{"case": row["case"].replace("prefill", "compact", 1), "ours_us": row["compact_us"],
             "bytes": row["compact_bytes"], "peer": "the whole of " + row["case"],
             "peer_us": row["ours_us"], "ratio": row["compact_us"] / row["ours_us"]}
            for row in ours if row["case"].startswith("prefill/") and "compact_us" in row]


def join(ours, peers, ceilings):
    """One row a case, in order of the case. A peer's row whose case of ours was not measured is
    left out; a row of ours appears under its own name unless a peer's row bears that name."""
    by_case = {row["case"]: row for row in ours}
    rows = {}
    for peer in peers:
        mine = by_case.get(peer.get("ours_case", peer["case"]))
        if mine is not None:
            rows[peer["case"]] = {**mine, **{k: v for k, v in peer.items() if k != "ours_case"},
                                  "ratio": peer["peer_us"] / mine["ours_us"]}
    for row in ours + compact_shares(ours):
        rows.setdefault(row["case"], dict(row))
    for row in rows.values():
        limit = limit_us(row, ceilings)
        if limit is not None:
            row["limit_us"], row["pct_of_limit"] = limit, 100.0 * limit / row["ours_us"]
        if limit is not None and "peer_us" not in row and row["case"] not in OWN_PEERS:
            row.update(peer="the limit", peer_us=limit)
        if "peer_us" in row and "ratio" not in row:
            row["ratio"] = row["peer_us"] / row["ours_us"]
        other, what = OWN_PEERS.get(row["case"], (None, None))
        if other in by_case and "peer_us" not in row:
            speed = by_case[other]["ours_us"] / row["ours_us"]
            row.update(peer=f"{other}, ours", peer_us=by_case[other]["ours_us"],
                       ratio=speed if what == "speed" else 1 / speed)
        for pattern, field in RATIO_FIELDS:
            if re.fullmatch(pattern, row["case"]) and field in row:
                row["ratio"] = row[field]
        operator, must, goal = BARS.get(row["case"], (None, None, None))
        for name, bar in (("must", must), ("goal", goal)):
            if bar is not None:
                row[name] = f"{operator} {bar:g}"
        if must is not None and "ratio" in row:
            row["met"] = meets(operator, row["ratio"], must)
    return [rows[case] for case in sorted(rows)]


def missing(rows):
    """The cases of TABLE that have no ratio."""
    return sorted(set(BARS) - {row["case"] for row in rows if "ratio" in row})


def table(rows):
    """The lines to print; a case that misses its bar is marked."""
    number = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
    lines = [f"{'case':34} {'ours us':>10} {'peer us':>11} {'ratio':>8} {'must':>8} {'':6} "
             f"{'limit us':>10} {'%':>6}  peer"]
    for row in rows:
        mark = "MISSED" if row.get("met") is False else ""
        lines.append(
            f"{row['case']:34} {row['ours_us']:10.1f} {number(row.get('peer_us'), 1):>11} "
            f"{number(row.get('ratio'), 3):>8} {row.get('must', ''):>8} {mark:6} "
            f"{number(row.get('limit_us'), 1):>10} {number(row.get('pct_of_limit'), 1):>6}  "
            f"{row.get('peer', '')}".rstrip())
    return lines
