//! A matrix as a checkpoint has it.

use crate::checkpoint::Bytes;
use crate::checkpoint::export::nf4_blocks;
use rushlight_quant::Matrix;
use rushlight_quant::formats::Format;
use std::ops::Range;
use std::sync::Arc;

/// A matrix as its file stores it, usually in place.
#[derive(Clone, Debug)]
pub struct Weight {
    format: Format,
    rows: usize,
    cols: usize,
    data: Bytes,
    order: Option<Arc<[u32]>>,
    fine: bool,
}

impl Weight {
    /// `rows` packed rows of `cols` weights; `None` where `data` is not exactly that.
    pub fn new(format: Format, rows: usize, cols: usize, data: Bytes) -> Option<Weight> {
        let weight = Weight { format, rows, cols, data, order: None, fine: false };
        (rows.checked_mul(format.row_bytes(cols)?)? == weight.data.len()).then_some(weight)
    }

    /// A matrix of f32 values.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Option<Weight> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Weight::new(Format::F32, rows, cols, Bytes::new(bytes))
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The packed rows, one after another.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Row `row` as stored.
    pub fn row(&self, row: usize) -> &[u8] {
        let bytes = self.data.len() / self.rows;
        &self.data[row * bytes..][..bytes]
    }

    /// The same matrix, whose columns are stored in the order `order`: column `i` of a row is input `order[i]`. `None`
    /// where that is no order of its columns.
    pub fn with_order(self, order: Arc<[u32]>) -> Option<Weight> {
        let mut seen = vec![false; self.cols];
        let all = order.iter().all(|&i| seen.get_mut(i as usize).is_some_and(|seen| !std::mem::replace(seen, true)));
        (all && order.len() == self.cols).then_some(Weight { order: Some(order), ..self })
    }

    /// The order in which columns are stored, where it is not their own (see [`Weight::with_order`]). Whoever multiplies
    /// by [`Weight::matrix`] gathers the inputs in this order first.
    pub fn order(&self) -> Option<&Arc<[u32]>> {
        self.order.as_ref()
    }

    /// The same matrix; whether generated tokens meet it with activations of 16 bits
    /// ([`Matrix::with_fine_activations`]).
    pub fn with_fine_activations(self, fine: bool) -> Weight {
        Weight { fine, ..self }
    }

    /// Decodes row `row`, its columns in their own order.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        match &self.order {
            None => self.format.decode(self.row(row), out),
            Some(order) => {
                let mut stored = vec![0.0; self.cols];
                self.format.decode(self.row(row), &mut stored);
                for (&i, w) in order.iter().zip(stored) {
                    out[i as usize] = w;
                }
            }
        }
    }

    /// All of it in f32, row by row, columns in their own order.
    pub(super) fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        (0..self.rows).for_each(|r| self.decode_row(r, &mut values[r * self.cols..][..self.cols]));
        values
    }

    /// What the kernels take: columns as they are stored.
    pub fn matrix(&self) -> Matrix<'_> {
        let matrix = Matrix::new(self.format, self.rows, self.cols, &self.data);
        matrix.expect("the length was checked by `new`").with_fine_activations(self.fine)
    }

    /// The rows `range`, in place; `None` where there are not so many.
    pub fn row_range(&self, range: Range<usize>) -> Option<Weight> {
        let bytes = self.data.len().checked_div(self.rows)?;
        let data = self.data.slice(range.start.checked_mul(bytes)?..range.end.checked_mul(bytes)?)?;
        Some(Weight { rows: range.len(), data, order: self.order.clone(), ..*self })
    }

    /// A copy with rows and columns exchanged, stored alike; `None` for formats that are not floating point.
    pub(super) fn transposed(&self) -> Option<Weight> {
        let size = self.format.is_float().then(|| self.format.block_bytes())?;
        let mut data = Vec::with_capacity(self.data.len());
        for col in 0..self.cols {
            for row in 0..self.rows {
                data.extend_from_slice(&self.data[(row * self.cols + col) * size..][..size]);
            }
        }
        Weight::new(self.format, self.cols, self.rows, Bytes::new(data))
    }

    /// A copy in 32 bits whose rows are divided by their length: what 16 bits hold exactly they no longer do then. `None`
    /// for formats that are not floating point.
    pub(super) fn normalised(&self) -> Option<Weight> {
        if !self.format.is_float() {
            return None;
        }
        let mut row = vec![0.0f32; self.cols];
        let mut data = Vec::with_capacity(4 * self.rows * self.cols);
        for r in 0..self.rows {
            self.decode_row(r, &mut row);
            let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt().max(1e-12);
            row.iter().for_each(|x| data.extend(((f64::from(*x) / length) as f32).to_le_bytes()));
        }
        Weight::new(Format::F32, self.rows, self.cols, Bytes::new(data))
    }

    /// For each of `heads` the columns of `keys` as rows, then the rows of `values`: `[heads * inputs, width]` and
    /// `[heads * outputs, inputs]` in one. It is stored in 16 bits where both parts are: blocks of codes cannot be
    /// transposed, and those hold what they say well enough.
    pub(super) fn of_heads(heads: usize, keys: &Weight, values: &Weight) -> Option<Weight> {
        let format = match (keys.format, values.format) {
            (Format::F32, _) | (_, Format::F32) => Format::F32,
            (Format::BF16, _) | (_, Format::BF16) => Format::BF16,
            _ => Format::F16,
        };
        let (inputs, width, outputs) = (values.cols, keys.cols, values.rows.checked_div(heads)?);
        let (mut head, mut row, mut data) = (vec![0.0; inputs * width], vec![0.0; inputs], Vec::new());
        for h in 0..heads {
            for (c, out) in head.chunks_exact_mut(width).enumerate() {
                keys.decode_row(h * inputs + c, out);
            }
            for output in 0..width {
                (0..inputs).try_for_each(|c| encode(format, head[c * width + output], &mut data))?;
            }
            for output in 0..outputs {
                values.decode_row(h * outputs + output, &mut row);
                row.iter().try_for_each(|&x| encode(format, x, &mut data))?;
            }
        }
        Weight::new(format, heads * (width + outputs), inputs, Bytes::new(data))
    }

    /// A copy in NF4 with doubly quantized magnitudes (Dettmers et al. 2023), as bitsandbytes would store it; columns in
    /// their own order. Rows that are no multiple of 32 are in floats again. `None` where a weight is not finite.
    pub fn in_nf4(&self) -> Option<Weight> {
        let decode = |first: usize, weights: &mut [f32]| {
            let rows = weights.chunks_exact_mut(self.cols).enumerate();
            rows.for_each(|(r, weights)| self.decode_row(first + r, weights));
        };
        let (format, data) = nf4_blocks(self.rows, self.cols, &decode)?;
        Some(Weight::new(format, self.rows, self.cols, Bytes::new(data))?.with_fine_activations(true))
    }

    /// A copy with the rows `order`, made when it is first looked at where these are.
    pub fn with_rows(&self, order: &[usize]) -> Weight {
        let data = self.data.rows(self.data.len() / self.rows, order);
        Weight { rows: order.len(), data, order: self.order.clone(), ..*self }
    }
}

/// Appends `x` as `format` stores it; `None` for formats that are not floating point.
fn encode(format: Format, x: f32, data: &mut Vec<u8>) -> Option<()> {
    match format {
        Format::F32 => data.extend_from_slice(&x.to_le_bytes()),
        Format::F16 => data.extend_from_slice(&half::f16::from_f32(x).to_le_bytes()),
        Format::BF16 => data.extend_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_16_bits_are_normalised_in_32() {
        let values = [0.3f32, -1.7, 0.011, 5.1, 0.0, 0.0, 0.0, 0.0];
        let data: Vec<u8> = values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
        let weight = Weight::new(Format::BF16, 2, 4, Bytes::new(data)).unwrap();
        let (plain, normed) = (weight.values(), weight.normalised().unwrap().values());
        let length = plain[..4].iter().map(|x| x * x).sum::<f32>().sqrt();
        for (got, x) in normed[..4].iter().zip(&plain) {
            assert!((got - x / length).abs() < 1e-7, "{normed:?}");
        }
        assert_eq!(normed[4..], [0.0; 4]);
    }
}
