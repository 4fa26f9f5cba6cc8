//! From inputs and errors of the layers to gradients of units, their norms, and their clipped sum.

use candle_core::{D, Layout, Result, Storage, Tensor};

/// One layer of one pass: its inputs `[rows, in]` and the loss's gradients at its output `[rows, out]`, before the activation.
#[derive(Debug, Clone)]
pub struct Trace {
    inputs: Tensor,
    errors: Tensor,
    bias: bool,
    range_log2: u8,
}

/// One layer's inputs and errors as they lie in memory: what `theriac-privacy` clips in whole numbers.
#[derive(Debug, Clone, Copy)]
pub struct Factors<'a> {
    /// Inputs `[rows, in]`; layers that share them have the same slice.
    pub inputs: &'a [f32],
    /// Errors `[rows, out]`.
    pub errors: &'a [f32],
    /// Whether the layer has a bias.
    pub bias: bool,
    /// log2 of the public range of the inputs.
    pub range_log2: u8,
}

/// The gradients of every unit of a pass, not yet multiplied out.
#[derive(Debug, Clone)]
pub struct UnitGradients {
    traces: Vec<Trace>,
    units: usize,
    rows: usize,
}

/// A sum of clipped gradients.
#[derive(Debug, Clone)]
pub struct ClippedSum {
    /// Flat: weight and bias of each layer, then the linear path.
    pub sum: Vec<f32>,
    /// Units that counted as zero, because a value of theirs was not finite.
    pub not_finite: usize,
}

impl Trace {
    /// Inputs `[rows, in]`, errors `[rows, out]`, and whether the layer has a bias. The range of the inputs is that of publicly scaled rows, ±8.
    pub fn new(inputs: Tensor, errors: Tensor, bias: bool) -> Self {
        Self {
            inputs,
            errors,
            bias,
            range_log2: PUBLIC_RANGE_LOG2,
        }
    }

    /// The same with inputs that lie within ±2^`range_log2` whatever was measured: 0 behind tanh.
    #[must_use]
    pub fn within(self, range_log2: u8) -> Self {
        Self { range_log2, ..self }
    }

    /// Inputs `[rows, in]`.
    pub fn inputs(&self) -> &Tensor {
        &self.inputs
    }

    /// Errors `[rows, out]`.
    pub fn errors(&self) -> &Tensor {
        &self.errors
    }

    /// Squared norm of each row's gradient, `[rows]`.
    fn row_squares(&self) -> Result<Tensor> {
        let inputs = self.inputs.sqr()?.sum(D::Minus1)?;
        let inputs = if self.bias { (inputs + 1.0)? } else { inputs };
        inputs * self.errors.sqr()?.sum(D::Minus1)?
    }

    /// Squared norm of each unit's gradient, `[units]`, from two small matrices of products of rows.
    fn gram_squares(&self, units: usize, rows: usize) -> Result<Tensor> {
        let inputs = gram(&self.inputs, units, rows)?;
        let inputs = if self.bias { (inputs + 1.0)? } else { inputs };
        (inputs * gram(&self.errors, units, rows)?)?.sum((1, 2))
    }

    /// Gradient summed over all rows.
    fn sum(&self, factors: Option<&Tensor>) -> Result<Vec<f32>> {
        let scaled = match factors {
            Some(factors) => self.errors.broadcast_mul(factors)?,
            None => self.errors.clone(),
        };
        let mut sum = scaled
            .t()?
            .matmul(&self.inputs)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        if self.bias {
            sum.extend(scaled.sum(0)?.to_vec1::<f32>()?);
        }
        Ok(sum)
    }

    /// Rows where `keep` `[rows, 1]` is 0 become zero, whatever they held.
    fn kept(&self, keep: &Tensor) -> Result<Self> {
        let zeroed = |values: &Tensor| {
            keep.broadcast_as(values.shape())?
                .where_cond(values, &values.zeros_like()?)
        };
        Ok(Self {
            inputs: zeroed(&self.inputs)?,
            errors: zeroed(&self.errors)?,
            bias: self.bias,
            range_log2: self.range_log2,
        })
    }
}

impl UnitGradients {
    /// Units of `rows` rows each, one after the other. A shorter unit is filled up with rows whose errors are zero.
    ///
    /// # Errors
    /// When the rows are not whole units.
    pub fn new(traces: Vec<Trace>, rows: usize) -> Result<Self> {
        let all = traces.first().map_or(Ok(0), |trace| trace.errors.dim(0))?;
        if rows == 0 || all % rows != 0 {
            candle_core::bail!("{all} rows are no whole number of units of {rows} rows");
        }
        Ok(Self {
            traces,
            units: all / rows,
            rows,
        })
    }

    /// Norm of each unit's gradient; NaN or infinite where a value is not finite.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn norms(&self) -> Result<Vec<f32>> {
        let mut squares: Option<Tensor> = None;
        for trace in &self.traces {
            let more = if self.rows == 1 {
                trace.row_squares()?
            } else {
                trace.gram_squares(self.units, self.rows)?
            };
            squares = Some(match squares {
                Some(sum) => (sum + more)?,
                None => more,
            });
        }
        let squares = squares.map_or_else(|| Ok(Vec::new()), |squares| squares.to_vec1::<f32>())?;
        // Rounding may end a little below zero; what is not a number must stay so.
        let root = |square: f32| if square < 0.0 { 0.0 } else { square.sqrt() };
        Ok(squares.into_iter().map(root).collect())
    }

    /// The plain sum over all units: what training without privacy uses.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn sum(&self) -> Result<Vec<f32>> {
        let sums = self
            .traces
            .iter()
            .map(|trace| trace.sum(None))
            .collect::<Result<Vec<_>>>()?;
        Ok(sums.concat())
    }

    /// The sum of all units' gradients, each scaled down to norm at most `clip_norm`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn clipped_sum(&self, clip_norm: f32) -> Result<ClippedSum> {
        let norms = self.norms()?;
        let not_finite = norms.iter().filter(|norm| !norm.is_finite()).count();
        let factor = |norm: &f32| {
            if norm.is_finite() {
                clip_norm / norm.max(clip_norm)
            } else {
                0.0
            }
        };
        let of_rows = |of_unit: Vec<f32>| -> Result<Tensor> {
            let spread: Vec<f32> = of_unit
                .into_iter()
                .flat_map(|f| std::iter::repeat_n(f, self.rows))
                .collect();
            let count = spread.len();
            Tensor::from_vec(spread, (count, 1), &candle_core::Device::Cpu)
        };
        let factors = of_rows(norms.iter().map(factor).collect())?;
        // Zero times NaN is NaN: such rows must be taken out.
        let keep = (not_finite > 0).then(|| factors.ne(0.0)).transpose()?;
        let sums = self.traces.iter().map(|trace| match &keep {
            Some(keep) => trace.kept(keep)?.sum(Some(&factors)),
            None => trace.sum(Some(&factors)),
        });
        Ok(ClippedSum {
            sum: sums.collect::<Result<Vec<_>>>()?.concat(),
            not_finite,
        })
    }

    /// The gradient of each unit on its own, flat; for models small enough that units × parameters fit into memory. This is what
    /// the exact, whole-number path of `theriac-privacy` takes.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn each(&self) -> Result<Vec<Vec<f32>>> {
        let mut flat = vec![Vec::new(); self.units];
        for trace in &self.traces {
            let (inputs, errors) = (self.by_unit(&trace.inputs)?, self.by_unit(&trace.errors)?);
            let weights = errors.transpose(1, 2)?.contiguous()?.matmul(&inputs)?;
            let weights = weights.flatten_from(1)?.to_vec2::<f32>()?;
            flat.iter_mut()
                .zip(weights)
                .for_each(|(unit, more)| unit.extend(more));
            if trace.bias {
                let biases = errors.sum(1)?.to_vec2::<f32>()?;
                flat.iter_mut()
                    .zip(biases)
                    .for_each(|(unit, more)| unit.extend(more));
            }
        }
        Ok(flat)
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Rows of a unit.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Gives the factors of all layers to `read`, without a copy.
    ///
    /// # Errors
    /// When a tensor is not of single precision in the processor's memory.
    pub fn with_factors<T>(&self, read: impl FnOnce(&[Factors<'_>]) -> T) -> Result<T> {
        let contiguous = self
            .traces
            .iter()
            .map(|trace| Ok((trace.inputs.contiguous()?, trace.errors.contiguous()?)));
        let contiguous = contiguous.collect::<Result<Vec<_>>>()?;
        let stored: Vec<_> = contiguous
            .iter()
            .map(|(inputs, errors)| (inputs.storage_and_layout(), errors.storage_and_layout()))
            .collect();
        let mut factors = Vec::with_capacity(stored.len());
        for (trace, ((inputs, input_layout), (errors, error_layout))) in self.traces.iter().zip(&stored) {
            factors.push(Factors {
                inputs: slice(inputs, input_layout)?,
                errors: slice(errors, error_layout)?,
                bias: trace.bias,
                range_log2: trace.range_log2,
            });
        }
        Ok(read(&factors))
    }

    fn by_unit(&self, values: &Tensor) -> Result<Tensor> {
        let width = values.dim(1)?;
        values.contiguous()?.reshape((self.units, self.rows, width))
    }
}

/// The values of a contiguous tensor.
fn slice<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    let Storage::Cpu(storage) = storage else {
        candle_core::bail!("gradients are clipped in the processor's memory");
    };
    let start = layout.start_offset();
    let end = start + layout.shape().elem_count();
    storage
        .as_slice::<f32>()?
        .get(start..end)
        .ok_or_else(|| candle_core::Error::Msg("a layout beyond its storage".to_owned()))
}

/// `[units, rows, rows]`: products of the rows of each unit.
fn gram(values: &Tensor, units: usize, rows: usize) -> Result<Tensor> {
    let values = values.contiguous()?.reshape((units, rows, values.dim(1)?))?;
    values.matmul(&values.transpose(1, 2)?.contiguous()?)
}

/// Publicly scaled rows are clipped to ±8, [`PUBLIC_CLIP`](crate::normalise::PUBLIC_CLIP).
const PUBLIC_RANGE_LOG2: u8 = 3;
