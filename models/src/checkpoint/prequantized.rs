//! Hugging Face directories whose weights another tool has quantized: what config.json says of them, and how their
//! layers become tensors of ordinary formats.
//!
//! Opening such a directory looks at the small tensors of each layer (zero points, scales, orders) and decides on a
//! format that holds its numbers as they are. The layer itself is packed when [`Checkpoint::tensor`] is asked for it,
//! from the mapped file and by several threads.

use super::{Bytes, Checkpoint, Stored, TensorInfo, awq, bitsandbytes, gptq, huggingface, mxfp4};
use crate::{Error, Result};
use rushlight_quant::buffer::Aligned;
use rushlight_quant::formats::{Format, bf16_to_f32, f16_to_f32};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// How a directory's weights are quantized.
#[derive(Debug)]
pub(super) enum Method {
    Gptq(gptq::Config),
    Awq(awq::Config),
    BitsAndBytes,
    Mxfp4,
}

impl Method {
    fn name(&self) -> &'static str {
        match self {
            Method::Gptq(_) => "GPTQ",
            Method::Awq(_) => "AWQ",
            Method::BitsAndBytes => "bitsandbytes",
            Method::Mxfp4 => "mxfp4",
        }
    }
}

const KNOWN: &str = "gptq, awq, bitsandbytes, mxfp4";

/// Reads `quantization_config` of `config`, or the file that older tools wrote in its place. `None` where the weights
/// are not quantized.
pub(super) fn describe(dir: &Path, config: &Value) -> Result<Option<Method>> {
    if let Some(fields) = config.get("quantization_config").filter(|v| !v.is_null()) {
        let path = dir.join("config.json");
        return method(&Fields { fields, path: &path }, None).map(Some);
    }
    for (name, otherwise) in [("quantize_config.json", "gptq"), ("quant_config.json", "awq")] {
        let path = dir.join(name);
        if path.is_file() {
            let fields = huggingface::read_config(&path)?;
            return method(&Fields { fields: &fields, path: &path }, Some(otherwise)).map(Some);
        }
    }
    Ok(None)
}

fn method(config: &Fields<'_>, otherwise: Option<&str>) -> Result<Method> {
    if !config.fields.is_object() {
        return Err(config.error("quantization_config is not an object"));
    }
    let load = ["load_in_4bit", "load_in_8bit"].iter().any(|name| config.fields.get(name) == Some(&Value::Bool(true)));
    match config.str("quant_method")?.or(otherwise) {
        Some("gptq") => gptq::Config::read(config).map(Method::Gptq),
        Some("awq") => awq::Config::read(config).map(Method::Awq),
        Some("bitsandbytes" | "bitsandbytes_4bit" | "bitsandbytes_8bit") => Ok(Method::BitsAndBytes),
        Some("mxfp4") => Ok(Method::Mxfp4),
        None if load => Ok(Method::BitsAndBytes),
        Some(other) => Err(config.error(format!(
            "its weights are quantized by '{other}', which cannot be read; the methods that can be are {KNOWN}: use one \
             of these, the original checkpoint or a GGUF file"
        ))),
        None => Err(config.error(format!(
            "its weights are quantized but quant_method is not given; the methods that can be read are {KNOWN}"
        ))),
    }
}

/// The fields of a quantization's description: every field has a type, and a wrong one is an error that names it.
pub(super) struct Fields<'a> {
    pub fields: &'a Value,
    pub path: &'a Path,
}

impl<'a> Fields<'a> {
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::file(self.path, what.to_string())
    }

    /// The first of `names` that is there and not null.
    pub fn get(&self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names.iter().find_map(|name| Some((*name, self.fields.get(name).filter(|v| !v.is_null())?)))
    }

    pub fn str(&self, name: &'static str) -> Result<Option<&'a str>> {
        match self.get(&[name]) {
            None => Ok(None),
            Some((_, value)) => {
                value.as_str().map(Some).ok_or_else(|| self.error(format!("the field {name} is {value}, not a string")))
            }
        }
    }

    pub fn integer(&self, names: &[&'static str]) -> Result<i64> {
        match self.get(names) {
            None => Err(self.error(format!("the field {} of its quantization is missing", names[0]))),
            Some((name, value)) => {
                value.as_i64().ok_or_else(|| self.error(format!("the field {name} is {value}, not a whole number")))
            }
        }
    }

    pub fn bool_or(&self, name: &'static str, default: bool) -> Result<bool> {
        match self.get(&[name]) {
            None => Ok(default),
            Some((_, value)) => {
                value.as_bool().ok_or_else(|| self.error(format!("the field {name} is {value}, not true or false")))
            }
        }
    }

    /// Bits and group size; a group of `None` is a whole row.
    pub fn grid(&self) -> Result<(u32, Option<usize>)> {
        let bits = self.integer(&["bits", "w_bit"])?;
        let Some(bits) = u32::try_from(bits).ok().filter(|bits| matches!(bits, 2 | 3 | 4 | 8)) else {
            return Err(self.error(format!("weights of {bits} bits cannot be read; those of 2, 3, 4 and 8 can")));
        };
        let group = self.integer(&["group_size", "q_group_size"])?;
        match (group, usize::try_from(group)) {
            (-1, _) => Ok((bits, None)),
            (_, Ok(group @ 1..)) => Ok((bits, Some(group))),
            _ => Err(self.error(format!("group_size is {group}: neither a number of columns nor -1"))),
        }
    }
}

/// A tensor as the file has it.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Bytes,
}

impl Part {
    /// Number `i` of the tensor, which is F32, F16 or BF16.
    #[inline]
    pub fn float(&self, i: usize) -> f32 {
        let half = || u16::from_le_bytes([self.data[2 * i], self.data[2 * i + 1]]);
        match self.dtype.as_str() {
            "F16" => f16_to_f32(half()),
            "BF16" => bf16_to_f32(half()),
            _ => f32::from_bits(word(&self.data, i)),
        }
    }
}

/// The `i`-th 32-bit word.
#[inline(always)]
pub(super) fn word(data: &[u8], i: usize) -> u32 {
    let at: [u8; 4] = match data[4 * i..].first_chunk() {
        Some(bytes) => *bytes,
        None => [0; 4],
    };
    u32::from_le_bytes(at)
}

/// The parts of a directory's tensors, by name, and which of them have been used.
pub(super) struct Parts {
    all: HashMap<String, Part>,
    used: HashSet<String>,
}

impl Parts {
    /// The part `name`, if it is there; it then belongs to a layer.
    pub fn take(&mut self, name: &str) -> Option<Part> {
        let part = self.all.get(name)?.clone();
        self.used.insert(name.to_owned());
        Some(part)
    }

    /// The part `name` of a layer, of one of these types and this shape (no shape: any).
    pub fn need(&mut self, name: &str, dtypes: &[&str], shape: Option<&[usize]>) -> Result<Part, String> {
        let Some(part) = self.take(name) else {
            return Err(format!("tensor '{name}' is missing: the directory is incomplete, download it again"));
        };
        let fits = dtypes.contains(&part.dtype.as_str()) && shape.is_none_or(|shape| part.shape == shape);
        if !fits {
            let shape = shape.map(|shape| format!(" {shape:?}")).unwrap_or_default();
            let Part { dtype, shape: is, .. } = &part;
            return Err(format!("tensor '{name}' should be {}{shape} but is {dtype} {is:?}", dtypes.join(" or ")));
        }
        Ok(part)
    }

    /// Every name that ends so, without that end, sorted.
    pub fn with_end(&self, end: &str) -> Vec<String> {
        let mut names: Vec<String> =
            self.all.keys().filter_map(|name| name.strip_suffix(end)).map(str::to_owned).collect();
        names.sort_unstable();
        names
    }
}

/// A layer that another tool has quantized.
#[derive(Debug)]
pub(super) struct Layer {
    pub rows: usize,
    pub cols: usize,
    /// What it is packed into.
    pub format: Format,
    /// The order in which its columns are packed, where it is not their own.
    pub order: Option<Arc<[u32]>>,
    pub parts: LayerParts,
}

#[derive(Debug)]
pub(super) enum LayerParts {
    Grid(gptq::Grid),
    Table(bitsandbytes::Table),
    Bytes(bitsandbytes::SignedBytes),
    Blocks(Arc<mxfp4::Blocks>),
}

impl Layer {
    /// The layer's packed rows. Those of experts are packed when they are first looked at.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub fn pack(&self) -> Result<Bytes, String> {
        match &self.parts {
            LayerParts::Grid(grid) => self.fill(64, &|first, out| grid.pack(self, first, out)),
            LayerParts::Table(table) => self.fill(16, &|first, out| table.pack(self, first, out)),
            LayerParts::Bytes(bytes) => self.fill(16, &|first, out| bytes.pack(self, first, out)),
            LayerParts::Blocks(blocks) => Ok(Bytes::made(blocks.clone(), self.rows)),
        }
    }

    /// Has `work` fill the packed rows from `first` on, `at_once` of them or what is left, on several threads.
    fn fill(&self, at_once: usize, work: &(dyn Fn(usize, &mut [u8]) + Sync)) -> Result<Bytes, String> {
        let row_bytes = self.format.row_bytes(self.cols).unwrap_or(0);
        let bytes = row_bytes.saturating_mul(self.rows);
        let Some(mut packed) = Aligned::<u8>::try_zeroed(bytes) else {
            return Err(format!("there is no memory for the {bytes} bytes of a layer: close other programs"));
        };
        if bytes > 0 {
            // A small layer is done before a thread has started.
            let parts = packed.chunks_mut(at_once * row_bytes).enumerate();
            in_parallel(parts, bytes >> 18, &|(i, part)| work(i * at_once, part));
        }
        struct Owned(Aligned<u8>);
        impl AsRef<[u8]> for Owned {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        Ok(Bytes::new(Owned(packed)))
    }
}

/// Has `work` do each of `parts`, on as many threads as the machine has but at most `most`.
pub(super) fn in_parallel<P: Send>(parts: impl Iterator<Item = P> + Send, most: usize, work: &(dyn Fn(P) + Sync)) {
    let parts = Mutex::new(parts);
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some(part) = next() {
            work(part);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(most);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
}

/// Collects the layers of a directory.
pub(super) struct Layers {
    dir: PathBuf,
    pub parts: Parts,
    layers: Vec<(TensorInfo, Layer)>,
    orders: HashSet<Arc<[u32]>>,
    /// Layers that no block format can hold.
    floats: usize,
}

impl Layers {
    /// Adds the layer whose weight is called `name`.
    pub fn add(&mut self, name: String, layer: Layer) {
        self.add_stack(name, &[], layer);
    }

    /// Adds the layer whose weight is called `name`: as many matrices as the dimensions `outer` say, one behind the other.
    pub fn add_stack(&mut self, name: String, outer: &[usize], mut layer: Layer) {
        // Queries, keys and values usually share their order: it is then kept, and later gathered, once.
        if let Some(order) = layer.order.take() {
            let shared = self.orders.get(&order).cloned().unwrap_or_else(|| {
                self.orders.insert(order.clone());
                order
            });
            layer.order = Some(shared);
        }
        self.floats += usize::from(layer.format.is_float());
        let of_matrix = layer.rows / outer.iter().product::<usize>();
        let shape = [outer, &[of_matrix, layer.cols]].concat();
        let info = TensorInfo { name, format: layer.format, shape };
        self.layers.push((info, layer));
    }

    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::file(&self.dir, what)
    }
}

/// Puts the layers of `checkpoint` in the place of the tensors that they are made of.
pub(super) fn resolve(mut checkpoint: Checkpoint, method: &Method) -> Result<Checkpoint> {
    let mut all = HashMap::with_capacity(checkpoint.infos.len() + checkpoint.raw.len());
    for (info, data) in checkpoint.infos.iter().zip(&checkpoint.data) {
        if let Stored::Mapped(data) = data {
            let (name, dtype, shape) = (info.name.clone(), info.format.name().to_owned(), info.shape.clone());
            all.insert(info.name.clone(), Part { name, dtype, shape, data: data.clone() });
        }
    }
    for t in &checkpoint.raw {
        let (name, dtype, shape, data) = (t.name.clone(), t.dtype.clone(), t.shape.clone(), t.data.clone());
        all.insert(t.name.clone(), Part { name, dtype, shape, data });
    }
    let mut layers = Layers {
        dir: checkpoint.path.clone(),
        parts: Parts { all, used: HashSet::new() },
        layers: Vec::new(),
        orders: HashSet::new(),
        floats: 0,
    };
    match method {
        Method::Gptq(config) => gptq::find(&mut layers, config)?,
        Method::Awq(config) => awq::find(&mut layers, config)?,
        Method::BitsAndBytes => bitsandbytes::find(&mut layers)?,
        Method::Mxfp4 => mxfp4::find(&mut layers)?,
    }
    if layers.layers.is_empty() {
        return Err(layers.error(format!(
            "its configuration says that the weights are quantized by {}, but no tensor is: download it again",
            method.name()
        )));
    }
    if layers.floats > 0 {
        checkpoint.notes.push(format!(
            "{}: {} of {} quantized layers have groups or rows that are not multiples of 32: they are used as f32, which \
             takes more memory",
            checkpoint.path.display(),
            layers.floats,
            layers.layers.len()
        ));
    }
    let used = &layers.parts.used;
    let (infos, data) = (std::mem::take(&mut checkpoint.infos), std::mem::take(&mut checkpoint.data));
    for (info, data) in infos.into_iter().zip(data).filter(|(info, _)| !used.contains(&info.name)) {
        checkpoint.infos.push(info);
        checkpoint.data.push(data);
    }
    checkpoint.raw.retain(|t| !used.contains(&t.name));
    for (info, layer) in layers.layers {
        checkpoint.infos.push(info);
        checkpoint.data.push(Stored::Packed(Box::new(layer)));
    }
    checkpoint.by_name = super::index_by_name(&checkpoint.infos, |t| &t.name).map_err(|name| {
        Error::file(&checkpoint.path, format!("tensor '{name}' is there both quantized and not: download it again"))
    })?;
    Ok(checkpoint)
}
