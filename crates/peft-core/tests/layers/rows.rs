//! Layers that work row by row: norm, rotation, SwiGLU, dropout, embedding.

use candle_core::Tensor;
use candle_nn::{Embedding, Module, RmsNorm as Oracle, ops, rotary_emb::rope_slow};
use half::bf16;
use shanty_peft_core::{
    backend::{Backend, View, cpu::Cpu},
    model::{EmbeddingView, ModelConfig},
    nn::{rms_norm::RmsNorm, rope::RopeTable},
    random::{DropoutKey, dropout_scales},
};

use crate::{
    SINGLE, SUM,
    scene::{
        Field, assert_near, backward, batch, constant, cpu, fresh, gradient, rows as random_rows, variable,
    },
};

#[test]
fn rms_norm() {
    let (cpu, mut random) = (cpu(), fresh());
    for (rows, features) in [(4, 3), (3, 7), (150, 130), (9, 384)] {
        let (x, dy) = (random.numbers(rows * features, 2.0), random.numbers(rows * features, 1.0));
        let (weight, before) = (random.around_one(features), random.numbers(rows * features, 1.0));
        let epsilon = 1e-2;
        let norm = RmsNorm::<Cpu> { weight: View::<Cpu>::new(&weight, 1, features), epsilon, trained: None };

        let input = variable(&x, rows, features);
        let oracle = Oracle::new(constant(&weight, 1, features).squeeze(0).unwrap(), f64::from(epsilon));
        let wanted = oracle.forward_diff(input.as_tensor()).unwrap();
        let wanted_dx = gradient(&backward(&wanted, &dy), &input);

        let x = Field::holding(&x, rows, features);
        let (mut y, mut reciprocal) = (Field::poisoned(rows, features), Field::poisoned(rows, 1));
        norm.forward(&cpu, x.view(), y.view_mut(), reciprocal.view_mut());
        assert_near("y", &y.numbers(), &wanted, SUM);
        let dy = Field::holding(&dy, rows, features);
        let mut dx = Field::holding(&before, rows, features);
        norm.backward(&cpu, dy.view(), x.view(), reciprocal.view(), dx.view_mut(), &mut []);
        assert_near("dx", &dx.added_to(&before), &wanted_dx, SUM);
    }
}

#[test]
fn rope_with_positions_that_restart() {
    let (cpu, mut random) = (cpu(), fresh());
    let (heads, head_dim) = (3, 10);
    let config = ModelConfig::from_json(
        br#"{"model_type": "llama", "vocab_size": 9, "hidden_size": 30, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 3, "head_dim": 10, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "hidden_act": "silu", "rope_theta": 500.0}"#,
        "config.json".as_ref(),
    )
    .unwrap();
    let table = RopeTable::new(&cpu, &config, 200).unwrap();
    let (packed, batch) = batch(&cpu, &random_rows(&mut random, &[&[200], &[1, 2, 33]], 9));
    let (tokens, columns) = (packed.tokens(), heads * head_dim);
    let (x, dy) = (random.numbers(tokens * columns, 1.0), random.numbers(tokens * columns, 1.0));

    // Angles are products in f32, as in Hugging Face's model; everything behind them is exact here.
    let frequencies = config.rope.inverse_frequencies(head_dim, 200);
    let angles = |number: fn(f64) -> f64| {
        let numbers: Vec<f64> = packed
            .positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |f| number(f64::from(position as f32 * f))))
            .collect();
        Tensor::from_vec(numbers, (tokens, head_dim / 2), &candle_core::Device::Cpu).unwrap()
    };
    let (cosines, sines) = (angles(f64::cos), angles(f64::sin));
    let input = variable(&x, tokens, columns);
    let by_head = input.reshape((1, tokens, heads, head_dim)).unwrap().transpose(1, 2).unwrap();
    let wanted = rope_slow(&by_head.contiguous().unwrap(), &cosines, &sines).unwrap();
    let wanted = wanted.transpose(1, 2).unwrap().contiguous().unwrap().reshape((tokens, columns)).unwrap();
    let wanted_dx = gradient(&backward(&wanted, &dy), &input);

    let mut x = Field::holding(&x, tokens, columns);
    table.forward(&cpu, &batch, x.view_mut());
    assert_near("y", &x.numbers(), &wanted, SINGLE);
    let mut dx = Field::holding(&dy, tokens, columns);
    table.backward(&cpu, &batch, dx.view_mut());
    assert_near("dx", &dx.numbers(), &wanted_dx, SINGLE);
}

#[test]
fn swiglu() {
    let (cpu, mut random) = (cpu(), fresh());
    for (rows, columns) in [(4, 3), (5, 19), (130, 150)] {
        let mut numbers = |bound| random.numbers(rows * columns, bound);
        let (gate, up, dout) = (numbers(9.0), numbers(2.0), numbers(1.0));
        let (gate_in, up_in) = (variable(&gate, rows, columns), variable(&up, rows, columns));
        let wanted = (ops::silu(gate_in.as_tensor()).unwrap() * up_in.as_tensor()).unwrap();
        let gradients = backward(&wanted, &dout);

        let (mut gate, mut up) = (Field::holding(&gate, rows, columns), Field::holding(&up, rows, columns));
        let (mut out, mut dout) = (Field::poisoned(rows, columns), Field::holding(&dout, rows, columns));
        cpu.swiglu(gate.view(), up.view(), out.view_mut());
        assert_near("out", &out.numbers(), &wanted, SINGLE);
        cpu.swiglu_backward(dout.view_mut(), gate.view_mut(), up.view_mut());
        assert_near("out again", &dout.numbers(), &wanted, SINGLE);
        assert_near("dgate", &gate.numbers(), &gradient(&gradients, &gate_in), SINGLE);
        assert_near("dup", &up.numbers(), &gradient(&gradients, &up_in), SINGLE);
    }
}

#[test]
fn geglu() {
    let (cpu, mut random) = (cpu(), fresh());
    for (rows, columns) in [(4, 3), (5, 19), (130, 150)] {
        let mut numbers = |bound| random.numbers(rows * columns, bound);
        let (gate, up, dout) = (numbers(6.0), numbers(2.0), numbers(1.0));
        let (gate_in, up_in) = (variable(&gate, rows, columns), variable(&up, rows, columns));
        let x = gate_in.as_tensor();
        let cube = ((x * x).unwrap() * x).unwrap();
        let inner =
            ((x + (cube * 0.044_715).unwrap()).unwrap() * (2.0 / std::f64::consts::PI).sqrt()).unwrap();
        let gelu = ((x * (inner.tanh().unwrap() + 1.0).unwrap()).unwrap() * 0.5).unwrap();
        let wanted = (gelu * up_in.as_tensor()).unwrap();
        let gradients = backward(&wanted, &dout);

        let (mut gate, mut up) = (Field::holding(&gate, rows, columns), Field::holding(&up, rows, columns));
        let (mut out, mut dout) = (Field::poisoned(rows, columns), Field::holding(&dout, rows, columns));
        cpu.geglu(gate.view(), up.view(), out.view_mut());
        assert_near("out", &out.numbers(), &wanted, SINGLE);
        cpu.geglu_backward(dout.view_mut(), gate.view_mut(), up.view_mut());
        assert_near("dgate", &gate.numbers(), &gradient(&gradients, &gate_in), SINGLE);
        assert_near("dup", &up.numbers(), &gradient(&gradients, &up_in), SINGLE);
    }
}

#[test]
fn numbers_are_scaled_and_bounded() {
    let (cpu, mut random) = (cpu(), fresh());
    let (rows, columns) = (33, 77);
    let x = random.numbers(rows * columns, 90.0);
    let wanted = constant(&x, rows, columns);
    let mut field = Field::holding(&x, rows, columns);
    cpu.scale(0.37, field.view_mut());
    let wanted = (wanted * f64::from(0.37_f32)).unwrap();
    assert_near("scaled", &field.numbers(), &wanted, SINGLE);
    cpu.soft_cap(30.0, field.view_mut());
    let wanted = ((wanted / 30.0).unwrap().tanh().unwrap() * 30.0).unwrap();
    assert_near("bounded", &field.numbers(), &wanted, SINGLE);
}

#[test]
fn dropout_with_the_oracle_s_own_mask() {
    let (cpu, mut random) = (cpu(), fresh());
    let (packed, batch) = batch(&cpu, &random_rows(&mut random, &[&[90], &[1, 2, 33]], 9));
    let tokens = packed.tokens();
    for (p, columns) in [(0.0, 70), (0.3, 70), (0.3, 384), (0.9, 3)] {
        let key = DropoutKey { seed: random.next(), step: random.next(), module: random.below(99) };
        let mut mask = vec![f32::NAN; tokens * columns];
        for (token, mask) in mask.chunks_exact_mut(columns).enumerate() {
            dropout_scales(key, packed.sample_ids[token], packed.positions[token], p, mask);
        }
        let dropped = mask.iter().filter(|scale| **scale == 0.0).count() as f64 / mask.len() as f64;
        // Six standard deviations of a share of n independent draws.
        let spread = 6.0 * (f64::from(p) * (1.0 - f64::from(p)) / mask.len() as f64).sqrt() + 1e-4;
        assert!((dropped - f64::from(p)).abs() <= spread, "{dropped} of the numbers were dropped, not {p}");

        let mut numbers = || random.numbers(tokens * columns, 1.0);
        let (x, dout, before) = (numbers(), numbers(), numbers());
        let input = variable(&x, tokens, columns);
        let wanted = (input.as_tensor() * constant(&mask, tokens, columns)).unwrap();
        let wanted_dx = gradient(&backward(&wanted, &dout), &input);

        let (x, dout) = (Field::holding(&x, tokens, columns), Field::holding(&dout, tokens, columns));
        let mut out = Field::poisoned(tokens, columns);
        cpu.dropout(&batch, key, p, x.view(), out.view_mut());
        assert_near("out", &out.numbers(), &wanted, SINGLE);
        let mut dx = Field::holding(&before, tokens, columns);
        cpu.dropout_backward(&batch, key, p, dout.view(), dx.view_mut());
        assert_near("dx", &dx.added_to(&before), &wanted_dx, SINGLE);
    }
}

/// The table is frozen: there is no gradient to check. Copies are exact.
#[test]
fn embedding_gathers_the_rows_of_its_ids() {
    let (cpu, mut random) = (cpu(), fresh());
    let (vocabulary, features) = (50, 37);
    let (packed, batch) = batch(&cpu, &random_rows(&mut random, &[&[300], &[1, 2]], vocabulary));
    let tokens = packed.tokens();
    let short: Vec<bf16> =
        random.numbers(vocabulary as usize * features, 1.0).into_iter().map(bf16::from_f32).collect();
    let table: Vec<f32> = short.iter().map(|number| number.to_f32()).collect();
    let oracle = Embedding::new(constant(&table, vocabulary as usize, features), features);
    let ids = Tensor::from_slice(&packed.token_ids, tokens, &candle_core::Device::Cpu).unwrap();
    let wanted = oracle.forward(&ids).unwrap();
    for table in [EmbeddingView::from_f32(&table, features), EmbeddingView::from_bf16(&short, features)] {
        let mut out = Field::poisoned(tokens, features);
        cpu.gather_embedding(&batch, &table, out.view_mut());
        assert_near("out", &out.numbers(), &wanted, 0.0);
    }
}
