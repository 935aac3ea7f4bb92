//! The forward pass of a BERT-family sentence encoder, on one thread.
//!
//! The network is BERT (Devlin, Chang, Lee, Toutanova 2018) with mean pooling as in Sentence-BERT
//! (Reimers, Gurevych 2019); all-MiniLM-L6-v2 is MiniLM (Wang et al. 2020) of six layers trained so.
//! The multiplications and the vector functions are those of the rten project.
//!
//! A batch is *ragged*: its sequences are laid one after the other, without padding and so without an
//! attention mask. The linear layers work on all rows at once, attention on each sequence by itself.
//! No number of one sequence depends on another, and a row of a product is summed in the same order
//! whatever the number of rows: a text gives the same bits in any batch.

use rten_gemm::{BiasVector, GemmExecutor, GemmInputA, GemmInputB, GemmOptions};
use rten_simd::{SimdOp, SimdUnaryOp};
use rten_tensor::NdTensorView;
use rten_vecmath::{Gelu, Normalize, NormalizeOptions, Softmax, Sum, SumSquareSub};

use super::weights::{Layer, LayerNorm, Linear, Weights};
use crate::{EmbedError, unit};

/// What one engine owns besides the shared weights: its multiplier, which can't leave its thread, and
/// buffers that keep their size from batch to batch.
pub(super) struct Forward {
    gemm: GemmExecutor<f32>,
    /// One row of `hidden` per token: the state that the layers refine.
    states: Vec<f32>,
    /// Query, key and value of each token, side by side.
    query_key_value: Vec<f32>,
    /// What attention gathered for each token, all heads.
    attended: Vec<f32>,
    /// Inside of the feed-forward part.
    intermediate: Vec<f32>,
    /// Attention of one head over one sequence: a square.
    scores: Vec<f32>,
    /// What one head gathered for one sequence.
    gathered: Vec<f32>,
}

impl Forward {
    pub(super) fn new() -> Self {
        Self {
            gemm: GemmExecutor::new(),
            states: Vec::new(),
            query_key_value: Vec::new(),
            attended: Vec::new(),
            intermediate: Vec::new(),
            scores: Vec::new(),
            gathered: Vec::new(),
        }
    }

    /// The unit vectors of `sequences`, in their order. Each is 1 to `max_positions` ids, all below
    /// `vocabulary`; the caller has made sure.
    pub(super) fn embed(
        &mut self,
        weights: &Weights,
        sequences: &[&[u32]],
    ) -> Result<Vec<Vec<f32>>, EmbedError> {
        self.look_up(weights, sequences);
        for layer in &weights.layers {
            self.layer(weights, layer, sequences)?;
        }
        self.pool(weights, sequences)
    }

    fn look_up(&mut self, weights: &Weights, sequences: &[&[u32]]) {
        let hidden = weights.hidden;
        self.states.clear();
        for sequence in sequences {
            for (&id, position) in sequence.iter().zip(weights.positions.chunks_exact(hidden)) {
                let word = &weights.words[id as usize * hidden..][..hidden];
                self.states.extend(word.iter().zip(position).map(|(word, position)| word + position));
            }
        }
        normalise(&weights.embedding_norm, &mut self.states);
    }

    fn layer(&mut self, weights: &Weights, layer: &Layer, sequences: &[&[u32]]) -> Result<(), EmbedError> {
        linear(&self.gemm, &layer.query_key_value, &self.states, &mut self.query_key_value, Target::Fresh)?;
        self.attend(weights, sequences)?;
        linear(&self.gemm, &layer.attention_out, &self.attended, &mut self.states, Target::Added)?;
        normalise(&layer.attention_norm, &mut self.states);
        linear(&self.gemm, &layer.up, &self.states, &mut self.intermediate, Target::Fresh)?;
        Gelu {}.map_mut(&mut self.intermediate);
        linear(&self.gemm, &layer.down, &self.intermediate, &mut self.states, Target::Added)?;
        normalise(&layer.out_norm, &mut self.states);
        Ok(())
    }

    /// `softmax(Q Kᵀ / √d) V` for each head of each sequence.
    fn attend(&mut self, weights: &Weights, sequences: &[&[u32]]) -> Result<(), EmbedError> {
        let hidden = weights.hidden;
        let width = hidden / weights.heads;
        let scale = (width as f32).sqrt().recip();
        self.attended.resize(self.states.len(), 0.0);
        let mut start = 0;
        for tokens in sequences.iter().map(|sequence| sequence.len()) {
            let rows = &self.query_key_value[start * 3 * hidden..][..tokens * 3 * hidden];
            let rows = NdTensorView::<f32, 2>::from_data([tokens, 3 * hidden], rows);
            self.scores.resize(tokens * tokens, 0.0);
            self.gathered.resize(tokens * width, 0.0);
            for head in 0..weights.heads {
                let part = |n: usize| {
                    let first = n * hidden + head * width;
                    rows.slice((.., first..first + width))
                };
                let (query, key, value) = (part(0), part(1), part(2));
                multiply(&self.gemm, &mut self.scores, query, key.transposed(), scale)?;
                for row in self.scores.chunks_exact_mut(tokens) {
                    Softmax::new_mut(row).dispatch();
                }
                let scores = NdTensorView::from_data([tokens, tokens], self.scores.as_slice());
                multiply(&self.gemm, &mut self.gathered, scores, value, 1.0)?;
                for (n, row) in self.gathered.chunks_exact(width).enumerate() {
                    self.attended[(start + n) * hidden + head * width..][..width].copy_from_slice(row);
                }
            }
            start += tokens;
        }
        Ok(())
    }

    fn pool(&self, weights: &Weights, sequences: &[&[u32]]) -> Result<Vec<Vec<f32>>, EmbedError> {
        let hidden = weights.hidden;
        let mut rest = self.states.as_slice();
        let mut vectors = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let (rows, after) = rest.split_at(sequence.len() * hidden);
            rest = after;
            let pooled = if weights.pool_first { &rows[..hidden] } else { rows };
            // The sum serves for the mean: both have the same direction.
            let mut vector = vec![0.0; hidden];
            for row in pooled.chunks_exact(hidden) {
                for (sum, x) in vector.iter_mut().zip(row) {
                    *sum += x;
                }
            }
            if !unit::normalise(&mut vector) {
                return Err(EmbedError::Engine { reason: "a vector is zero or not finite".to_owned() });
            }
            vectors.push(vector);
        }
        Ok(vectors)
    }
}

/// Where a linear map puts its result.
#[derive(PartialEq)]
enum Target {
    /// In place of what was there.
    Fresh,
    /// Added to what is there: a residual connection.
    Added,
}

fn linear(
    gemm: &GemmExecutor<f32>,
    map: &Linear,
    x: &[f32],
    y: &mut Vec<f32>,
    into: Target,
) -> Result<(), EmbedError> {
    let rows = x.len() / map.inputs;
    y.resize(rows * map.bias.len(), 0.0);
    let x = NdTensorView::from_data([rows, map.inputs], x);
    let options = GemmOptions {
        beta: if into == Target::Added { 1.0 } else { 0.0 },
        bias: Some(BiasVector::Row(&map.bias)),
        ..GemmOptions::default()
    };
    gemm.gemm(y, GemmInputA::Unpacked(x), GemmInputB::Packed(&map.weight), options)
        .map_err(|error| failed(&error))
}

fn multiply(
    gemm: &GemmExecutor<f32>,
    y: &mut [f32],
    a: NdTensorView<'_, f32, 2>,
    b: NdTensorView<'_, f32, 2>,
    alpha: f32,
) -> Result<(), EmbedError> {
    let options = GemmOptions { alpha, ..GemmOptions::default() };
    gemm.gemm(y, GemmInputA::Unpacked(a), GemmInputB::Unpacked(b), options).map_err(|error| failed(&error))
}

fn failed(error: &rten_gemm::GemmError) -> EmbedError {
    EmbedError::Engine { reason: format!("matrix multiplication: {error}") }
}

fn normalise(norm: &LayerNorm, states: &mut [f32]) {
    let width = norm.gain.len();
    for row in states.chunks_exact_mut(width) {
        let mean = Sum::new(row).dispatch() / width as f32;
        let variance = SumSquareSub::new(row, mean).dispatch() / width as f32;
        let options = NormalizeOptions {
            pre_scale_bias: mean,
            scale: (variance + norm.epsilon).sqrt().recip(),
            element_scale: Some(&norm.gain),
            element_bias: Some(&norm.bias),
            ..NormalizeOptions::default()
        };
        Normalize::new_mut(row, options).dispatch();
    }
}
