//! Virtual tokens alone: where they are put, and that what comes back of each is the sum over all segments.

use shanty_peft_core::{
    backend::{Backend, SpanStart},
    batch::{PackedBatch, VirtualTokens},
};

use crate::{
    SINGLE,
    scene::{Field, assert_near, constant, cpu, fresh, loaded, rows},
};

const LENGTHS: [&[u32]; 3] = [&[3, 1, 7], &[70], &[2, 2]];

#[test]
fn keys_are_put_between_virtual_ones_and_come_back() {
    let (cpu, mut random) = (cpu(), fresh());
    for (count, columns) in [(1, 5), (4, 130)] {
        let mut packed = PackedBatch::default();
        packed.fill_behind(VirtualTokens::Keys(count), &rows(&mut random, &LENGTHS, 9)).unwrap();
        let batch = loaded(&cpu, &packed);
        let (tokens, keys) = (packed.tokens(), packed.keys());
        let (prefix, x) = (random.numbers(count * columns, 1.0), random.numbers(tokens * columns, 1.0));
        let (from, own) = (Field::holding(&prefix, count, columns), Field::holding(&x, tokens, columns));
        let mut joined = Field::poisoned(keys, columns);
        cpu.put_virtual(&batch, SpanStart::Keys, from.view(), joined.view_mut());
        cpu.rows_to_keys(&batch, own.view(), joined.view_mut());

        let mut wanted = Vec::new();
        let mut own = x.chunks_exact(columns);
        for length in LENGTHS.iter().flat_map(|lengths| lengths.iter()) {
            wanted.extend_from_slice(&prefix);
            (0..*length).for_each(|_| wanted.extend_from_slice(own.next().unwrap()));
        }
        assert_eq!(joined.numbers(), wanted);

        let mut back = Field::poisoned(tokens, columns);
        cpu.keys_to_rows(&batch, joined.view(), back.view_mut());
        assert_eq!(back.numbers(), x);
    }
}

#[test]
fn gradients_of_all_segments_are_added_up() {
    let (cpu, mut random) = (cpu(), fresh());
    for virtual_tokens in [VirtualTokens::Keys(3), VirtualTokens::Rows(3)] {
        let (count, columns) = (3, 33);
        let mut packed = PackedBatch::default();
        packed.fill_behind(virtual_tokens, &rows(&mut random, &LENGTHS, 9)).unwrap();
        let batch = loaded(&cpu, &packed);
        let (dx, before) =
            (random.numbers(packed.keys() * columns, 1.0), random.numbers(count * columns, 1.0));
        let mut wanted = vec![0.0; count * columns];
        for span in &packed.spans {
            let front = &dx[span.key_start * columns..][..count * columns];
            wanted.iter_mut().zip(front).for_each(|(wanted, dx)| *wanted += dx);
        }
        let dx = Field::holding(&dx, packed.keys(), columns);
        let mut sum = Field::holding(&before, count, columns);
        cpu.sum_virtual(&batch, dx.view(), sum.view_mut());
        assert_near("sum", &sum.added_to(&before), &constant(&wanted, count, columns), SINGLE);
    }
}
