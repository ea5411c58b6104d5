//! One thread of anamnesis: NF4 encode of bfloat16 weights, and decode to bfloat16. Prints the median GB/s of the
//! bfloat16 side, one line each: `encode X`, `decode Y`.
use std::hint::black_box;
use std::time::Instant;

use anamnesis::{dequantize_bnb4_to_bf16, encode_bnb4_compute_absmax, NF4_CODEBOOK};

const ELEMENTS: usize = 4096 * 4096;
const BLOCK: usize = 64;
const RUNS: usize = 5;

/// bfloat16 of roughly normal values (the sum of four uniform ones) of standard deviation 0.02.
fn weights() -> Vec<u8> {
    let mut state = 13_u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut bytes = Vec::with_capacity(ELEMENTS * 2);
    for _ in 0..ELEMENTS {
        let x = (uniform() + uniform() + uniform() + uniform()) * 0.0346;
        bytes.extend_from_slice(&((x.to_bits() >> 16) as u16).to_le_bytes());
    }
    bytes
}

fn median(mut call: impl FnMut()) -> f64 {
    call();
    let mut seconds: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    (ELEMENTS * 2) as f64 / seconds[RUNS / 2] / 1e9
}

fn main() {
    let source = weights();
    let map: Vec<u8> = NF4_CODEBOOK.iter().flat_map(|x| x.to_le_bytes()).collect();
    let (packed, absmax) = encode_bnb4_compute_absmax(&source, &map, ELEMENTS, BLOCK).expect("encode");
    let encode = median(|| {
        black_box(encode_bnb4_compute_absmax(black_box(&source), &map, ELEMENTS, BLOCK).expect("encode"));
    });
    let decode = median(|| {
        black_box(dequantize_bnb4_to_bf16(black_box(&packed), &absmax, &map, ELEMENTS, BLOCK).expect("decode"));
    });
    println!("encode {encode:.4}\ndecode {decode:.4}");
}
