//! Attention alone: grouped heads, packed segments, spans shorter and longer than a tile, keys of a cache, windows and
//! bounded scores.

use candle_core::{D, Device, Tensor, Var};
use candle_nn::ops;
use shanty_peft_core::{
    backend::{AttentionShape, Backend},
    batch::{PackedBatch, Span},
};

use crate::{
    SUM,
    memory::Random,
    scene::{Field, assert_near, backward, cpu, fresh, gradient, loaded, variable},
};

/// One span after the other, with `keys` keys for `queries` queries each.
fn packed(spans: &[(usize, usize)]) -> PackedBatch {
    let mut packed = PackedBatch::default();
    let (mut query_start, mut key_start) = (0, 0);
    for &(queries, keys) in spans {
        packed.spans.push(Span { query_start, queries, key_start, keys });
        packed.positions.extend((keys - queries) as u32..keys as u32);
        query_start += queries;
        key_start += keys;
    }
    packed.token_ids = vec![0; query_start];
    packed.sample_ids = vec![0; query_start];
    packed
}

/// Output `[queries, heads * head_dim]` and `ln sum e^score` `[queries, heads]` of one span.
fn oracle(shape: AttentionShape, span: &Span, q: &Tensor, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
    let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let heads = |x: &Tensor, start: usize, rows: usize, heads: usize| {
        let x = x.narrow(0, start, rows).unwrap().reshape((rows, heads, dim)).unwrap();
        x.transpose(0, 1).unwrap().contiguous().unwrap()
    };
    let repeated = |x: Tensor| {
        let wide = x.unsqueeze(1).unwrap().broadcast_as((shape.kv_heads, group, span.keys, dim)).unwrap();
        wide.contiguous().unwrap().reshape((shape.heads, span.keys, dim)).unwrap()
    };
    let q = heads(q, span.query_start, span.queries, shape.heads);
    let k = repeated(heads(k, span.key_start, span.keys, shape.kv_heads));
    let v = repeated(heads(v, span.key_start, span.keys, shape.kv_heads));
    let before = span.keys - span.queries;
    let unseen: Vec<f64> = (0..span.queries)
        .flat_map(|query| (0..span.keys).map(move |key| (query + before, key)))
        .map(|(query, key)| {
            let seen = key <= query && shape.window.is_none_or(|window| key + window > query);
            if seen { 0.0 } else { f64::NEG_INFINITY }
        })
        .collect();
    let unseen = Tensor::from_vec(unseen, (span.queries, span.keys), &Device::Cpu).unwrap();
    let scores = q.matmul(&k.transpose(1, 2).unwrap().contiguous().unwrap()).unwrap();
    let mut scores = (scores * f64::from(shape.scale)).unwrap();
    if let Some(cap) = shape.soft_cap.map(f64::from) {
        scores = ((scores / cap).unwrap().tanh().unwrap() * cap).unwrap();
    }
    let scores = scores.broadcast_add(&unseen).unwrap();
    let out = ops::softmax(&scores, D::Minus1).unwrap().matmul(&v).unwrap();
    let out = out.transpose(0, 1).unwrap().contiguous().unwrap().reshape((span.queries, ())).unwrap();
    (out, scores.log_sum_exp(D::Minus1).unwrap().t().unwrap().contiguous().unwrap())
}

fn check(random: &mut Random, (heads, kv_heads, head_dim): (usize, usize, usize), spans: &[(usize, usize)]) {
    check_shape(random, AttentionShape::new(heads, kv_heads, head_dim), spans);
}

fn check_shape(random: &mut Random, shape: AttentionShape, spans: &[(usize, usize)]) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let cpu = cpu();
    let packed = packed(spans);
    let batch = loaded(&cpu, &packed);
    let (rows, key_rows) = (packed.tokens(), spans.iter().map(|span| span.1).sum::<usize>());
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    // Scores of a few units: the softmax is neither even nor a single one.
    let (q, k) = (random.numbers(rows * wide, 2.0), random.numbers(key_rows * narrow, 2.0));
    let (v, dout) = (random.numbers(key_rows * narrow, 1.0), random.numbers(rows * wide, 1.0));

    let inputs: [Var; 3] =
        [variable(&q, rows, wide), variable(&k, key_rows, narrow), variable(&v, key_rows, narrow)];
    let [q_in, k_in, v_in] = &inputs;
    let parts: Vec<_> = packed.spans.iter().map(|span| oracle(shape, span, q_in, k_in, v_in)).collect();
    let joined = |parts: Vec<&Tensor>| Tensor::cat(&parts, 0).unwrap();
    let wanted = joined(parts.iter().map(|part| &part.0).collect());
    let wanted_sum = joined(parts.iter().map(|part| &part.1).collect());
    let gradients = backward(&wanted, &dout);

    let (q, k) = (Field::holding(&q, rows, wide), Field::holding(&k, key_rows, narrow));
    let (v, dout) = (Field::holding(&v, key_rows, narrow), Field::holding(&dout, rows, wide));
    let (mut out, mut log_sum) = (Field::poisoned(rows, wide), Field::poisoned(rows, heads));
    cpu.attention(&batch, shape, q.view(), k.view(), v.view(), out.view_mut(), log_sum.view_mut());
    assert_near("out", &out.numbers(), &wanted, SUM);
    assert_near("logarithm of the sum", &log_sum.numbers(), &wanted_sum, SUM);

    let mut dq = Field::poisoned(rows, wide);
    let (mut dk, mut dv) = (Field::poisoned(key_rows, narrow), Field::poisoned(key_rows, narrow));
    cpu.attention_backward(
        &batch,
        shape,
        q.view(),
        k.view(),
        v.view(),
        out.view(),
        log_sum.view(),
        dout.view(),
        dq.view_mut(),
        dk.view_mut(),
        dv.view_mut(),
    );
    assert_near("dv", &dv.numbers(), &gradient(&gradients, v_in), SUM);
    let [dq_wanted, dk_wanted] = [q_in, k_in].map(|input| gradient(&gradients, input));
    if shape.window == Some(1) || spans.iter().all(|&(_, keys)| keys == 1) {
        // One key has all the weight whatever the score: these gradients are 0, but for rounding.
        let largest = dq.numbers().iter().chain(&dk.numbers()).fold(0.0_f32, |a, b| a.max(b.abs()));
        assert!(largest <= SUM as f32, "a single key's score got a gradient of {largest}");
        return;
    }
    assert_near("dq", &dq.numbers(), &dq_wanted, SUM);
    assert_near("dk", &dk.numbers(), &dk_wanted, SUM);
}

/// The tile is 64 queries: spans of 1, 2, odd, just around one tile, and of several.
const PACKED: [(usize, usize); 8] =
    [(1, 1), (2, 2), (37, 37), (63, 63), (64, 64), (65, 65), (1, 1), (150, 150)];

#[test]
fn grouped_heads_in_packed_segments() {
    check(&mut fresh(), (6, 2, 8), &PACKED);
}

#[test]
fn one_key_head_for_all_and_one_for_each() {
    let mut random = fresh();
    check(&mut random, (4, 1, 20), &PACKED);
    check(&mut random, (3, 3, 64), &PACKED);
}

#[test]
fn each_length_of_a_span_alone() {
    let mut random = fresh();
    for length in [1, 2, 3, 63, 64, 65, 127, 128, 129, 200] {
        check(&mut random, (4, 2, 16), &[(length, length)]);
    }
}

/// As with a cache: fewer queries than keys, the last query sees the last key.
#[test]
fn queries_behind_the_keys_of_a_cache() {
    check(&mut fresh(), (6, 2, 8), &[(1, 40), (5, 5), (3, 130), (70, 71), (66, 140)]);
}

/// Windows of one key, of a few, around a tile, and wider than any span; the same behind a cache.
#[test]
fn queries_see_no_further_than_their_window() {
    let mut random = fresh();
    for window in [1, 2, 5, 63, 64, 65, 100, 1000] {
        let shape = AttentionShape { window: Some(window), ..AttentionShape::new(6, 2, 8) };
        check_shape(&mut random, shape, &PACKED);
        check_shape(&mut random, shape, &[(1, 40), (5, 5), (3, 130), (70, 71), (66, 140)]);
    }
}

/// Scores of a few units under caps that bend most of them, some of them, and hardly any.
#[test]
fn scores_are_bounded_with_their_slope() {
    let mut random = fresh();
    for (soft_cap, window) in [(0.5, None), (3.0, None), (3.0, Some(7)), (50.0, Some(70))] {
        let shape = AttentionShape { window, soft_cap: Some(soft_cap), ..AttentionShape::new(6, 2, 8) };
        check_shape(&mut random, AttentionShape { scale: 0.3, ..shape }, &PACKED);
        check_shape(&mut random, shape, &[(1, 40), (3, 130), (70, 71)]);
    }
}
