"""Mutations of the routing kernels: selection, barriers, and the permutation's arithmetic."""

from __future__ import annotations

from tests.host.mutations import BARRIER, Mutation

ROUTING, KEYS, GROUPS = "routing.cuh", "routing_keys.cuh", "routing_groups.cuh"
TOPK, LISTED, PERMUTE = "topk.cuh", "listed.cuh", "permute.cuh"

ROUTING_MUTATIONS = {
    # Selection.
    "routing: tokens": Mutation(
        "routing_topk.cu", "if (token >= p.num_tokens) return;", "", case="default"
    ),
    "routing: experts": Mutation(
        ROUTING, "inside ? order_image_of_number(key) : 0", "order_image_of_number(key)",
        "routing_topk", case="negative keys",
    ),
    "routing: NaN": Mutation(
        ROUTING, "x[i] = not_nan(x[i]);", "x[i] = x[i];", "routing_topk", case="top_k"
    ),
    "routing: bias of NaN": Mutation(
        KEYS, "return not_nan(__fadd_rn(score, bias));", "return __fadd_rn(score, bias);",
        "routing_topk", case="bias without numbers",
    ),
    "routing: scale": Mutation(
        ROUTING, "__fmul_rn(weight, p.scaling_factor), ", "weight, ", "routing_topk",
        case="deepseek_v3 groups",
    ),
    "routing: group lanes": Mutation(
        GROUPS, "group < lane / kLanes ? 1u", "group <= lane / kLanes ? 1u", "routing_topk",
        case="deepseek_v3 groups",
    ),
    "routing: ties of groups": Mutation(
        GROUPS, "(group < lane / kLanes ? 1u : 0u)", "0u", "routing_topk",
        case="deepseek_v3 groups of one",
    ),
    "routing: groups that a lane sees": Mutation(
        GROUPS, "inside && other", "other", "routing_topk", case="deepseek_v3 few groups"
    ),
    "routing: groups that other lanes see": Mutation(
        GROUPS, "better += __shfl_xor_sync(kFullMask, better, offset);", "", "routing_topk",
        case="deepseek_v3 groups",
    ),
    "routing: score of its lane": Mutation(
        ROUTING, "if (own == i) selected.score", "if (own <= i) selected.score", "routing_topk",
        case="deepseek_v3 ungrouped",
    ),
    "routing: second of a group": Mutation(
        GROUPS, "max(min(first, other_first), max(second, other_second))",
        "max(second, other_second)", "routing_topk", case="deepseek_v3 groups",
    ),
    "routing: odd groups": Mutation(
        GROUPS, "owner ? second : first", "first", "routing_topk", case="deepseek_v3 odd groups"
    ),
    "routing: marks of odd groups": Mutation(
        GROUPS, "group % kGroupSlots == slot", "slot == 0", "routing_topk",
        case="deepseek_v3 odd groups",
    ),
    "routing: groups in a lane": Mutation(
        GROUPS, "mark = score[i / kGroupSize];", "mark = score[0];", "routing_topk",
        case="deepseek_v3 groups of one lane",
    ),
    "top-k: ties of lanes": Mutation(
        TOPK, "(lanes & ((1u << lane) - 1u)) == 0", "(lanes >> lane) == 1", "routing_topk"
    ),
    "top-k: ties in a lane": Mutation(TOPK, "skip > 0 &&", "skip < 0 &&", "routing_topk"),
    "top-k: runs of ties": Mutation(
        TOPK, "lane > 0 && image_before == mine", "image_before == mine", "routing_topk"
    ),
    "top-k: ties past the first word": Mutation(
        TOPK, "equal[i / 32]", "equal[0]", "routing_permute", case="block, 2048 experts in groups"
    ),
    "top-k: sort": Mutation(
        TOPK, "if constexpr (STEP > 1) sort_pass<SORTED, STEP / 2>(v);", "", "routing_topk",
        case="deepseek_v3 groups of one lane",
    ),
    "list: bound": Mutation(
        LISTED, "if (groups < COUNT) {", "if (groups + 1 < COUNT) {", "routing_topk",
        case="top_k list",
    ),
    "list: bound of NaN": Mutation(
        ROUTING, "!(x[i] < bound)", "x[i] >= bound", "routing_topk", case="top_k list"
    ),
    "list: bound of the experts": Mutation(
        ROUTING, "expert < NUM_EXPERTS ? key_at(expert, x[i]) : -INFINITY",
        "key_at(min(expert, NUM_EXPERTS - 1), x[i])", "routing_topk", case="minimax2 list, last",
    ),
    "list: bound of terms": Mutation(
        ROUTING, "__fsub_rn(bound, 0x1p-12f)", "bound", "routing_topk", case="default list"
    ),
    "list: bound of terms of 0": Mutation(
        ROUTING, "> -75.0f ?", "> -750.0f ?", "routing_topk", case="default list"
    ),
    "list: experts": Mutation(
        ROUTING, "kLast * kWarpSize + lane >= NUM_EXPERTS", "lane < 0", "routing_topk",
        case="top_k list",
    ),
    "list: sum with infinity": Mutation(
        KEYS, "row_max == INFINITY ?", "row_max != row_max ?", "routing_topk",
        case="default list",
    ),
    "list: sum of nothing": Mutation(
        KEYS, "row_sum = fmaxf(row_sum, 1.0f);", "", "routing_topk", case="default list"
    ),
    "list: places": Mutation(
        LISTED, "if (lane >= offset) through", "if (lane > offset) through", "routing_topk",
        case="top_k list",
    ),
    "list: words past the first": Mutation(
        LISTED, "(32 * w + __ffs(left) - 1)", "(__ffs(left) - 1)", "routing_topk",
        case="top_k list",
    ),
    "list: ends": Mutation(
        LISTED, "if (!inside) word = 0;", "", "routing_topk", case="top_k_sigmoid list"
    ),
    "list: second word of a lane": Mutation(
        LISTED, "held > j", "held > 2 * j", "routing_topk", case="top_k_sigmoid list"
    ),
    "list: ties": Mutation(
        LISTED, "static_cast<uint32_t>(~index)", "static_cast<uint32_t>(index)", "routing_topk",
        case="top_k list",
    ),
    "list: ranks": Mutation(
        LISTED, "larger[j] += of_a + of_b;", "larger[j] += of_a;", "routing_topk",
        case="top_k list",
    ),
    "list: bar": Mutation(
        LISTED, "bar = list[COUNT - 1];", "bar = list[0];", "routing_topk", case="default list"
    ),
    "list: rows of many": Mutation(
        LISTED, "if (i >= 32 * w) mine", "if (i < 32 * w) mine", "routing_topk",
        case="default list",
    ),
    "list: dropped words": Mutation(
        LISTED, "  list[lane] = list[kWarpSize + lane] = 0;\n  __syncwarp();\n#pragma",
        "  __syncwarp();\n#pragma", "routing_topk", case="default list",
    ),
    "list: words are read before they are dropped": Mutation(
        LISTED, "  __syncwarp();\n  list[lane]", "  list[lane]", "routing_topk",
        case="default list",
    ),
    "list: words are dropped before they are written": Mutation(
        LISTED, "  __syncwarp();\n#pragma", "#pragma", "routing_topk", case="default list"
    ),
    "list: indices are complete": Mutation(
        LISTED, "    __syncwarp();\n    constexpr", "    constexpr", "routing_topk",
        case="default list",
    ),
    "list: words are complete": Mutation(
        LISTED, "  __syncwarp();\n  sort_list", "  sort_list", "routing_topk", case="default list"
    ),
    "softmax: term of infinity": Mutation(
        "exact.cuh", "return x == INFINITY ? 1.0f : one[0];", "return one[0];", "routing_topk",
        case="hard to sort",
    ),
    "softmax: subnormal terms": Mutation(
        "exact.cuh", "fmaxf(x[i], -104.0f)", "fmaxf(x[i], -87.0f)", "routing_topk",
        case="default list",
    ),
    "sigmoid: reduction": Mutation(
        "exact.cuh", "__fmaf_rn(n[i], -0x1.62e4p-1f", "__fmaf_rn(n[i], -0x1.62e3p-1f",
        "routing_topk", case="many sigmoids",
    ),
    "sigmoid: quotient": Mutation(
        "exact.cuh", "t[i] = __fmaf_rn(above[i], reciprocal[i], t[i]);", ";", "routing_topk",
        case="many sigmoids",
    ),
    "sigmoid: ends": Mutation(
        "exact.cuh", "fmaxf(-fabsf(x[i]), -80.0f)", "-fabsf(x[i])", "routing_topk", case="sigmoid"
    ),
    # Routing with the permutation: barriers.
    "permute: barrier after clearing": Mutation(
        "routing_permute.cu", BARRIER, "", case="block"
    ),
    "permute: barrier after counting": Mutation(
        "routing_permute.cu", BARRIER, "", case="block", nth=1
    ),
    "permute: barrier before the scan": Mutation(
        "routing_permute.cu", BARRIER, "", case="block", nth=2
    ),
    "permute: barrier after the scan": Mutation(
        "routing_permute.cu", BARRIER, "", case="block", nth=3
    ),
    "permute: cluster begins together": Mutation(
        "routing_permute.cu", "ptx::cluster_wait();", "", case="first of a cluster"
    ),
    "permute: cluster counts together": Mutation(
        "routing_permute.cu", "ptx::mbarrier_wait_cluster(complete, 0);", "", case="cluster"
    ),
    "permute: counts of the cluster": Mutation(
        "routing_permute.cu", "CLUSTER * shared.words * 4", "(CLUSTER - 1) * shared.words * 4",
        case="cluster",
    ),
    "permute: barrier of the scan": Mutation(PERMUTE, BARRIER, "", "routing_permute", case="block"),
    "count: barrier after clearing": Mutation("routing_count.cu", BARRIER, "", case="tails"),
    "count: barrier before the store": Mutation(
        "routing_count.cu", BARRIER, "", case="tails", nth=1
    ),
    "place: barrier after clearing": Mutation("permute_place.cu", BARRIER, "", case="tails"),
    "place: barrier before the scan": Mutation(
        "permute_place.cu", BARRIER, "", case="tails", nth=1
    ),
    "place: barrier after the scan": Mutation(
        "permute_place.cu", BARRIER, "", case="tails", nth=2
    ),
    "permute: warp sync before the update": Mutation(
        PERMUTE, "__syncwarp();", "", "permute_place", case="given"
    ),
    # Its arithmetic.
    "permute: rank of a source": Mutation(
        "routing_permute.cu", "counts + chunk * shared.words + word", "counts + word",
        case="cluster",
    ),
    "permute: last chunk": Mutation(
        "routing_permute.cu", "min(chunk_begin + p.chunk_tokens, p.num_tokens)",
        "chunk_begin + p.chunk_tokens", case="cluster",
    ),
    "permute: written slots": Mutation(
        "routing_permute.cu", "slot < (chunk_end - chunk_begin) * p.columns", "slot < 32",
        case="block",
    ),
    "permute: token of a written slot": Mutation(
        "routing_permute.cu", "write_slot(p, chunk_begin + token", "write_slot(p, token",
        case="cluster",
    ),
    "count: last chunk": Mutation(
        "routing_count.cu", "min(chunk_begin + p.chunk_tokens, p.num_tokens)",
        "chunk_begin + p.chunk_tokens", case="tails",
    ),
    "place: last chunk": Mutation(
        "permute_place.cu", "min(p.chunk_slots, p.num_slots - chunk_begin)", "p.chunk_slots",
        case="tails",
    ),
    "place: ids ahead": Mutation(
        "permute_place.cu", "if (slot + kWarpSize < end) id", "if (slot < 0) id",
        case="given, several rounds of a run",
    ),
    "permute: halves": Mutation(PERMUTE, "(16 * (expert & 1))", "(16 * (~expert & 1))",
                                "permute_place", case="tails"),
    "permute: earlier chunks": Mutation(
        PERMUTE, "base + j * parts < chunk", "base + j * parts <= chunk", "permute_place",
        case="tails",
    ),
    "permute: earlier blocks": Mutation(
        PERMUTE, "b < block ? count : 0", "b <= block ? count : 0", "routing_permute",
        case="cluster",
    ),
    "permute: quotients": Mutation(
        "divisor.cuh", "low + (n - low * divisor >= divisor ? 1u : 0u)", "low", "permute_place",
        case="given",
    ),
    "permute: chunks ahead": Mutation(
        PERMUTE, "base += AHEAD * parts", "base += (AHEAD + 1) * parts", "permute_place",
        case="more chunks than are under way",
    ),
    "permute: earlier runs": Mutation(
        PERMUTE, "running += counts[warp];", "running = counts[warp];", "permute_place",
        case="given",
    ),
    "permute: lanes of the scan": Mutation(
        PERMUTE, "if (lane >= offset) through", "if (lane > offset) through", "permute_place",
        case="tails",
    ),
    "permute: warps of the scan": Mutation(
        PERMUTE, "lane < warp ? s.warp_sum[lane]", "lane <= warp ? s.warp_sum[lane]",
        "permute_place", case="more experts than threads",
    ),
    "permute: last offset": Mutation(
        PERMUTE, "threadIdx.x == blockDim.x - 1", "threadIdx.x == 0", "permute_place", case="tails"
    ),
    "permute: peers": Mutation(
        PERMUTE, "counted(run[expert >> 1], expert) + earlier", "counted(run[expert >> 1], expert)",
        "permute_place", case="given",
    ),
    "permute: slot of -1": Mutation(
        PERMUTE, "if (row >= 0) t.token_idx", "t.token_idx", "permute_place", case="shard"
    ),
    "permute: padding": Mutation(
        PERMUTE, "lane; r < last * t.tile; r += kWarpSize) t.token_idx[r] = -1;",
        "lane; r < last * t.tile; r += kWarpSize) t.token_idx[r] = 0;", "permute_place",
        case="tails",
    ),
    "permute: unused tiles": Mutation(
        PERMUTE, "int i = used + thread", "int i = used + 1 + thread", "permute_place",
        case="tails",
    ),
    "permute: unused rows": Mutation(
        PERMUTE, "int r = used * t.tile + thread", "int r = used * t.tile + 1 + thread",
        "permute_place", case="tails",
    ),
    "permute: end of a tile": Mutation(
        PERMUTE, "min((i + 1) * t.tile, row_end)", "row_end", "permute_place",
        case="given, all on one expert",
    ),
    "permute: experts of the lanes": Mutation(
        PERMUTE, "base + holder * num_warps", "base + holder", "permute_place",
        case="more experts than threads",
    ),
    "experts: shard": Mutation(
        "experts.cuh", "routed < num_local_routed", "routed <= num_local_routed", "permute_place",
        case="shard",
    ),
    "given: shared experts": Mutation(
        "given.cuh", "p.top_k < p.columns && id >= p.experts.num_experts", "false",
        "routing_permute", case="given, packed",
    ),
    "given: slots": Mutation(
        "given.cuh", "slot += kWarpSize", "slot += 4 * kWarpSize", "routing_permute",
        case="given, more columns than lanes",
    ),
}  # fmt: skip
