//! A dense network with tanh between its layers and, if wanted, a linear path beside them; backward pass by hand.
//!
//! ```text
//! h₀ = x,  h_l = tanh(W_l h_{l−1} + b_l),  y = W_L h_{L−1} + b_L + S x
//! ```

use candle_core::{Device, Result, Tensor};

use super::clipped::Trace;
use crate::forecaster::HIDDEN;
use crate::global::delta_layout;
use crate::{LAG_COUNT, global::GlobalModel};

/// Rows of each product of a trace. The matrix library chooses its way, and with it the order of sums, by the size of the whole product, so every product has the
/// same size, whatever the batch. Small enough that a small batch costs little more than it must, large enough that a product of them is quick.
const PASS_ROWS: usize = 256;

/// Weight `[out, in]` and bias `[out]`.
#[derive(Debug, Clone)]
pub struct DenseLayer {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Tensor,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct DenseNetwork {
    layers: Vec<DenseLayer>,
    /// `[out of the last layer, in of the first]`; it shares the last layer's bias.
    skip: Option<Tensor>,
}

/// What a forward pass leaves for the backward pass.
#[derive(Debug)]
struct Forward {
    /// Input of each layer, `[rows, in]`.
    inputs: Vec<Tensor>,
    /// `[rows, out]`.
    output: Tensor,
}

impl DenseNetwork {
    /// Layers in order, and the linear path.
    ///
    /// # Errors
    /// When shapes do not follow from one another, or there is no layer.
    pub fn new(layers: Vec<DenseLayer>, skip: Option<Tensor>) -> Result<Self> {
        let widths = layers
            .iter()
            .map(|layer| layer.weight.dims2())
            .collect::<Result<Vec<_>>>()?;
        let (Some(first), Some(last)) = (widths.first(), widths.last()) else {
            candle_core::bail!("a network has at least one layer");
        };
        if !widths.windows(2).all(|pair| pair[0].0 == pair[1].1) {
            candle_core::bail!("layers of {widths:?} do not follow from one another");
        }
        if let Some(skip) = &skip
            && skip.dims2()? != (last.0, first.1)
        {
            candle_core::bail!(
                "the linear path is {:?}, not {:?}",
                skip.dims(),
                (last.0, first.1)
            );
        }
        Ok(Self { layers, skip })
    }

    /// The shipped model: the residual network of `global`, beside a linear path `[channel, 5·channels]` that is trained with it.
    ///
    /// # Errors
    /// Never for a model of this crate.
    pub fn shipped(global: &GlobalModel, linear: Option<&[f32]>) -> Result<Self> {
        let (channels, layout, values) = (
            global.channels(),
            delta_layout(global.channels()),
            global.network(),
        );
        let tensor = |name: &str, shape: &[usize]| {
            let range = layout.range(name).unwrap_or_default();
            Tensor::from_slice(&values[range], shape, &Device::Cpu)
        };
        let inputs = channels * LAG_COUNT;
        let layers = vec![
            DenseLayer {
                weight: tensor("network.hidden.weight", &[HIDDEN, inputs])?,
                bias: tensor("network.hidden.bias", &[HIDDEN])?,
            },
            DenseLayer {
                weight: tensor("network.output.weight", &[channels, HIDDEN])?,
                bias: tensor("network.output.bias", &[channels])?,
            },
        ];
        let skip = linear
            .map(|weights| Tensor::from_slice(weights, (channels, inputs), &Device::Cpu))
            .transpose()?;
        Self::new(layers, skip)
    }

    /// Layers in order.
    pub fn layers(&self) -> &[DenseLayer] {
        &self.layers
    }

    /// The linear path.
    pub fn skip(&self) -> Option<&Tensor> {
        self.skip.as_ref()
    }

    /// Number of parameters, in the order of a flat gradient: weight and bias of each layer, then the linear path.
    pub fn parameters(&self) -> usize {
        let dense = self
            .layers
            .iter()
            .map(|layer| layer.weight.elem_count() + layer.bias.elem_count());
        dense.sum::<usize>() + self.skip.as_ref().map_or(0, Tensor::elem_count)
    }

    /// Output `[rows, out]`.
    ///
    /// # Errors
    /// When `input` is not `[rows, in]`.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        Ok(self.run(input, Tensor::matmul)?.output)
    }

    /// Inputs and errors of every layer for the loss `½ Σ_rows mean_channels (y − target)²`; `input` `[rows, in]`, `target` `[rows, out]`.
    ///
    /// What comes of a row follows from that row alone, to the last bit, whatever rows are beside it and however many: exact clipping rests on that. Matrix products sum in
    /// another order where there are fewer or more rows, so each is made for 256 rows at a time, the last ones filled up with rows of zeros.
    ///
    /// # Errors
    /// When shapes do not match.
    pub fn trace(&self, input: &Tensor, target: &Tensor) -> Result<Vec<Trace>> {
        let rows = input.dim(0)?;
        if target.dim(0)? != rows {
            candle_core::bail!("{rows} rows have {} targets", target.dim(0)?);
        }
        let forward = self.run(input, in_passes)?;
        let channels = forward.output.dims2()?.1.max(1);
        let error = ((&forward.output - target)? * (1.0 / channels as f64))?;
        let mut traces = Vec::with_capacity(self.layers.len() + 1);
        if self.skip.is_some() {
            traces.push(Trace::new(input.clone(), error.clone(), false));
        }
        let mut error = error;
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let input = forward.inputs[index].clone();
            let below = if index == 0 {
                None
            } else {
                // h = tanh(z): dh/dz = 1 − h².
                let slope = input.sqr()?.affine(-1.0, 1.0)?;
                Some((in_passes(&error, &layer.weight)? * slope)?)
            };
            let trace = Trace::new(input, error.clone(), true);
            // tanh stays within ±1.
            traces.push(if index == 0 { trace } else { trace.within(0) });
            if let Some(below) = below {
                error = below;
            }
        }
        // From the first layer to the last, then the linear path.
        traces.reverse();
        Ok(traces)
    }

    /// The same network after the step `−rate · gradient`; `gradient` flat as [`Self::parameters`] says.
    ///
    /// # Errors
    /// When the gradient has another length.
    pub fn step(&self, gradient: &[f32], rate: f64) -> Result<Self> {
        if gradient.len() != self.parameters() {
            candle_core::bail!(
                "{} values are no gradient of {} parameters",
                gradient.len(),
                self.parameters()
            );
        }
        let mut rest = gradient;
        let mut moved = |tensor: &Tensor| {
            let (mine, others) = rest.split_at(tensor.elem_count());
            rest = others;
            let step = Tensor::from_slice(mine, tensor.dims(), &Device::Cpu)?;
            (tensor - (step * rate)?)?.detach().contiguous()
        };
        let layers = self.layers.iter().map(|layer| {
            let weight = moved(&layer.weight)?;
            let bias = moved(&layer.bias)?;
            Ok(DenseLayer { weight, bias })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let skip = self.skip.as_ref().map(&mut moved).transpose()?;
        Ok(Self { layers, skip })
    }

    fn run(&self, input: &Tensor, product: fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Forward> {
        let mut inputs = Vec::with_capacity(self.layers.len());
        let mut current = input.clone();
        let last = self.layers.len() - 1;
        for (index, layer) in self.layers.iter().enumerate() {
            let sum = product(&current, &layer.weight.t()?)?.broadcast_add(&layer.bias)?;
            inputs.push(current);
            current = if index < last { sum.tanh()? } else { sum };
        }
        if let Some(skip) = &self.skip {
            current = (current + product(input, &skip.t()?)?)?;
        }
        Ok(Forward {
            inputs,
            output: current,
        })
    }
}

/// `rows · other`, [`PASS_ROWS`] rows at a time.
fn in_passes(rows: &Tensor, other: &Tensor) -> Result<Tensor> {
    let count = rows.dim(0)?;
    if count == PASS_ROWS || count == 0 {
        return rows.matmul(other);
    }
    let mut products = Vec::with_capacity(count.div_ceil(PASS_ROWS));
    for first in (0..count).step_by(PASS_ROWS) {
        let here = PASS_ROWS.min(count - first);
        let part = rows.narrow(0, first, here)?;
        let product = if here == PASS_ROWS {
            part.matmul(other)?
        } else {
            let filled = part.pad_with_zeros(0, 0, PASS_ROWS - here)?;
            filled.matmul(other)?.narrow(0, 0, here)?
        };
        products.push(product);
    }
    Tensor::cat(&products, 0)
}
