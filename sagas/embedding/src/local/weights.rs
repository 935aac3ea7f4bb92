//! A BERT-family encoder's weights, read from a Hugging Face folder and packed for multiplication.

use std::path::Path;

use rten_gemm::{GemmExecutor, PackedBMatrix};
use rten_tensor::NdTensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::files;
use crate::EmbedError;

/// `config.json`, as far as it decides what is computed.
#[derive(Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_act: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    layer_norm_eps: f32,
    max_position_embeddings: usize,
    vocab_size: usize,
}

/// `1_Pooling/config.json` in the two forms that sentence-transformers has written.
#[derive(Debug, Default, Deserialize)]
struct Pooling {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode: Option<String>,
}

/// `y = x W + b`.
pub(super) struct Linear {
    pub(super) weight: PackedBMatrix<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) inputs: usize,
}

pub(super) struct LayerNorm {
    pub(super) gain: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) epsilon: f32,
}

pub(super) struct Layer {
    /// Query, key and value side by side, so that one multiplication makes all three.
    pub(super) query_key_value: Linear,
    pub(super) attention_out: Linear,
    pub(super) attention_norm: LayerNorm,
    pub(super) up: Linear,
    pub(super) down: Linear,
    pub(super) out_norm: LayerNorm,
}

/// All that the forward pass reads. Immutable, so that every engine shares one copy.
pub(super) struct Weights {
    /// Length of a token's state and of the resulting vector.
    pub(super) hidden: usize,
    pub(super) heads: usize,
    /// One row of `hidden` per token id.
    pub(super) words: Vec<f32>,
    /// One row of `hidden` per position, with the embedding of token type 0 already added.
    pub(super) positions: Vec<f32>,
    pub(super) embedding_norm: LayerNorm,
    pub(super) layers: Vec<Layer>,
    /// The vector is the first token's state instead of the mean of all.
    pub(super) pool_first: bool,
    pub(super) max_positions: usize,
    pub(super) vocabulary: usize,
}

impl Weights {
    /// Reads `config.json`, `model.safetensors` and, where present, `1_Pooling/config.json`.
    pub(super) fn open(dir: &Path) -> Result<Self, EmbedError> {
        let config: Config = serde_json::from_slice(&files::read(dir, files::CONFIG)?)
            .map_err(|error| files::invalid(dir, format!("{}: {error}", files::CONFIG)))?;
        check(&config).map_err(|reason| files::invalid(dir, format!("{}: {reason}", files::CONFIG)))?;
        let pooling = if dir.join(files::POOLING).is_file() {
            serde_json::from_slice(&files::read(dir, files::POOLING)?)
                .map_err(|error| files::invalid(dir, format!("{}: {error}", files::POOLING)))?
        } else {
            Pooling::default()
        };
        let file = files::read(dir, files::WEIGHTS)?;
        let tensors = SafeTensors::deserialize(&file)
            .map_err(|error| files::invalid(dir, format!("{} is damaged: {error}", files::WEIGHTS)))?;
        Reader { tensors, gemm: GemmExecutor::new(), epsilon: config.layer_norm_eps }
            .weights(&config, &pooling)
            .map_err(|reason| files::invalid(dir, format!("{}: {reason}", files::WEIGHTS)))
    }
}

/// Refuses what the forward pass would compute wrongly.
fn check(config: &Config) -> Result<(), String> {
    if config.model_type != "bert" || config.hidden_act != "gelu" {
        return Err(format!(
            "model_type {:?} with hidden_act {:?} is not supported, only \"bert\" with \"gelu\"",
            config.model_type, config.hidden_act
        ));
    }
    let heads = config.num_attention_heads;
    if config.hidden_size == 0 || heads == 0 || !config.hidden_size.is_multiple_of(heads) {
        return Err(format!("hidden_size {} can't be shared among {heads} heads", config.hidden_size));
    }
    Ok(())
}

struct Reader<'a> {
    tensors: SafeTensors<'a>,
    /// Packs for the kernel of this machine's processor, which the engines will use too.
    gemm: GemmExecutor<f32>,
    epsilon: f32,
}

impl Reader<'_> {
    fn weights(&self, config: &Config, pooling: &Pooling) -> Result<Weights, String> {
        let hidden = config.hidden_size;
        let mut positions =
            self.tensor("embeddings.position_embeddings.weight", &[config.max_position_embeddings, hidden])?;
        // Sentences have one part only, so the token type is always the first row. Models differ in how
        // many rows they have.
        let types = self.rows("embeddings.token_type_embeddings.weight", hidden)?;
        for position in positions.chunks_exact_mut(hidden) {
            for (x, kind) in position.iter_mut().zip(&types) {
                *x += kind;
            }
        }
        Ok(Weights {
            hidden,
            heads: config.num_attention_heads,
            words: self.tensor("embeddings.word_embeddings.weight", &[config.vocab_size, hidden])?,
            positions,
            embedding_norm: self.norm("embeddings.LayerNorm", hidden)?,
            layers: (0..config.num_hidden_layers)
                .map(|n| self.layer(n, hidden, config.intermediate_size))
                .collect::<Result<_, _>>()?,
            pool_first: pooling.pooling_mode_cls_token || pooling.pooling_mode.as_deref() == Some("cls"),
            max_positions: config.max_position_embeddings,
            vocabulary: config.vocab_size,
        })
    }

    fn layer(&self, n: usize, hidden: usize, intermediate: usize) -> Result<Layer, String> {
        let name = |part: &str| format!("encoder.layer.{n}.{part}");
        let attention = ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}")));
        Ok(Layer {
            query_key_value: self.linear(&attention, hidden, hidden)?,
            attention_out: self.linear(&[name("attention.output.dense")], hidden, hidden)?,
            attention_norm: self.norm(&name("attention.output.LayerNorm"), hidden)?,
            up: self.linear(&[name("intermediate.dense")], hidden, intermediate)?,
            down: self.linear(&[name("output.dense")], intermediate, hidden)?,
            out_norm: self.norm(&name("output.LayerNorm"), hidden)?,
        })
    }

    /// The linear maps of `names`, all from `inputs` to `outputs` numbers, as one.
    fn linear(&self, names: &[String], inputs: usize, outputs: usize) -> Result<Linear, String> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            weight.extend(self.tensor(&format!("{name}.weight"), &[outputs, inputs])?);
            bias.extend(self.tensor(&format!("{name}.bias"), &[outputs])?);
        }
        // PyTorch stores [outputs, inputs]; the multiplication wants the transpose.
        let stored = NdTensorView::from_data([bias.len(), inputs], weight.as_slice());
        Ok(Linear { weight: self.gemm.prepack_b(stored.transposed()), bias, inputs })
    }

    fn norm(&self, name: &str, hidden: usize) -> Result<LayerNorm, String> {
        Ok(LayerNorm {
            gain: self.tensor(&format!("{name}.weight"), &[hidden])?,
            bias: self.tensor(&format!("{name}.bias"), &[hidden])?,
            epsilon: self.epsilon,
        })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
        let (found, numbers) = self.numbers(name)?;
        if found == shape { Ok(numbers) } else { Err(format!("{name} has shape {found:?}, not {shape:?}")) }
    }

    /// A matrix of any number of rows, but at least one.
    fn rows(&self, name: &str, columns: usize) -> Result<Vec<f32>, String> {
        let (found, numbers) = self.numbers(name)?;
        match found[..] {
            [rows, found] if rows > 0 && found == columns => Ok(numbers),
            _ => Err(format!("{name} has shape {found:?}, not [1 or more, {columns}]")),
        }
    }

    /// Shape and content. Some exports put `bert.` before every name.
    fn numbers(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), String> {
        let tensor = self.tensors.tensor(name).or_else(|_| self.tensors.tensor(&format!("bert.{name}")));
        let tensor = tensor.map_err(|error| format!("{name}: {error}"))?;
        if tensor.dtype() != Dtype::F32 {
            return Err(format!("{name} is of type {:?}; only F32 is supported", tensor.dtype()));
        }
        let (numbers, _) = tensor.data().as_chunks::<4>();
        Ok((tensor.shape().to_vec(), numbers.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()))
    }
}
