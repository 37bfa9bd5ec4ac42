//! The little of llama.cpp's C interface that the commands need, with its pointers kept in.

use std::ffi::{CStr, CString, c_char, c_void};
use std::io::Write;
use std::path::Path;
use std::ptr::{self, NonNull};

use llama_cpp_sys_2 as sys;

/// A token of the vocabulary.
pub type Token = sys::llama_token;

/// What went wrong, in one line.
pub type Result<T> = std::result::Result<T, String>;

/// Starts llama.cpp, with its log reduced to warnings and errors.
pub fn start() {
    unsafe extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
        if (level == sys::GGML_LOG_LEVEL_ERROR || level == sys::GGML_LOG_LEVEL_WARN) && !text.is_null() {
            // SAFETY: llama.cpp passes a string that ends in a zero byte and lives for the call.
            let text = unsafe { CStr::from_ptr(text) };
            let _ = std::io::stderr().write_all(text.to_bytes());
        }
    }
    // SAFETY: called once, before any other call; the callback is a plain function.
    unsafe {
        sys::llama_log_set(Some(log), ptr::null_mut());
        sys::llama_backend_init();
    }
}

/// The instruction sets llama.cpp was built with, as it prints them.
pub fn system_info() -> String {
    // SAFETY: returns a static string that ends in a zero byte.
    unsafe { CStr::from_ptr(sys::llama_print_system_info()) }.to_string_lossy().trim().to_owned()
}

/// How attention is computed: fused tiles, plain matrices, or whichever llama.cpp prefers.
#[derive(Clone, Copy, PartialEq)]
pub enum FlashAttention {
    Auto,
    Off,
    On,
}

/// Weights, or the vocabulary alone.
pub struct Model(NonNull<sys::llama_model>);

impl Model {
    /// Opens a GGUF file; `vocab_only` leaves the weights out.
    pub fn open(path: &Path, vocab_only: bool) -> Result<Model> {
        let name = c_string(path)?;
        // SAFETY: the name ends in a zero byte and outlives the call; the parameters are llama.cpp's own defaults.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.vocab_only = vocab_only;
            sys::llama_model_load_from_file(name.as_ptr(), params)
        };
        NonNull::new(model).map(Model).ok_or_else(|| format!("{}: llama.cpp cannot load this file", path.display()))
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_get_vocab(self.0.as_ptr()) }
    }

    /// Number of tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_n_tokens(self.vocab()) }.max(0) as usize
    }

    /// The token that begins a text, if this model wants one.
    pub fn bos(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab()).then(|| sys::llama_vocab_bos(self.vocab())) }
    }

    /// Text to ids. `special` parses the names of special tokens and adds the beginning token where the model wants it.
    pub fn tokenize(&self, text: &[u8], add_special: bool, parse_special: bool) -> Result<Vec<Token>> {
        let too_long = || "the text is too long".to_owned();
        let len = i32::try_from(text.len()).map_err(|_| too_long())?;
        let mut ids: Vec<Token> = vec![0; text.len() + 8];
        let capacity = i32::try_from(ids.len()).map_err(|_| too_long())?;
        // SAFETY: both buffers have the lengths given.
        let n = unsafe {
            let (text, ids) = (text.as_ptr().cast(), ids.as_mut_ptr());
            sys::llama_tokenize(self.vocab(), text, len, ids, capacity, add_special, parse_special)
        };
        ids.truncate(usize::try_from(n).map_err(|_| "llama.cpp cannot tokenize this text".to_owned())?);
        Ok(ids)
    }

    /// A context for `sequences` of up to `len` tokens each, in chunks of at most 512.
    pub fn context(
        &self,
        len: usize,
        sequences: usize,
        threads: usize,
        attention: FlashAttention,
    ) -> Result<Context<'_>> {
        let small = |n: usize| u32::try_from(n).map_err(|_| format!("{n} is too large"));
        // SAFETY: the model outlives the context (by the lifetime); the parameters start from the defaults.
        let context = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = small(len.saturating_mul(sequences))?;
            params.n_batch = small(len.clamp(1, 2048).max(sequences))?;
            params.n_ubatch = small(len.clamp(1, 512).max(sequences))?;
            params.n_seq_max = small(sequences)?;
            params.n_threads = i32::try_from(threads).map_err(|_| "too many threads".to_owned())?;
            params.n_threads_batch = params.n_threads;
            params.flash_attn_type = match attention {
                FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
                FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
                FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
            };
            sys::llama_init_from_model(self.0.as_ptr(), params)
        };
        let context = NonNull::new(context).ok_or_else(|| format!("no context of {len} tokens could be made"))?;
        Ok(Context { context, model: self })
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: made by llama_model_load_from_file, freed once.
        unsafe { sys::llama_model_free(self.0.as_ptr()) }
    }
}

/// A sequence with its KV cache (f16).
pub struct Context<'m> {
    context: NonNull<sys::llama_context>,
    model: &'m Model,
}

impl Context<'_> {
    /// Puts a LoRA adapter in force, which llama.cpp frees with the model.
    pub fn adapt(&mut self, path: &Path) -> Result<()> {
        let name = c_string(path)?;
        // SAFETY: the name ends in a zero byte and outlives the call; the model is alive.
        let adapter = unsafe { sys::llama_adapter_lora_init(self.model.0.as_ptr(), name.as_ptr()) };
        if adapter.is_null() {
            return Err(format!("{}: llama.cpp cannot load this adapter", path.display()));
        }
        let (mut adapters, mut scales) = ([adapter], [1.0]);
        // SAFETY: both arrays have one element; the adapter was made for this context's model.
        match unsafe {
            sys::llama_set_adapters_lora(self.context.as_ptr(), adapters.as_mut_ptr(), 1, scales.as_mut_ptr())
        } {
            0 => Ok(()),
            code => Err(format!("{}: llama.cpp refuses this adapter ({code})", path.display())),
        }
    }

    /// Forgets every token.
    pub fn clear(&mut self) {
        // SAFETY: the context is alive.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context.as_ptr()), true) }
    }

    /// Appends tokens and waits until their results are there: logits of the last one, or of `all`.
    pub fn decode(&mut self, tokens: &[Token], all: bool) -> Result<()> {
        let mut tokens = tokens.to_vec();
        let n = i32::try_from(tokens.len()).map_err(|_| "too many tokens at once".to_owned())?;
        let mut wanted = vec![1i8; tokens.len()];
        // SAFETY: `tokens` and `wanted` have n elements and outlive the call; positions follow on by themselves.
        let status = unsafe {
            let mut batch = sys::llama_batch_get_one(tokens.as_mut_ptr(), n);
            if all {
                batch.logits = wanted.as_mut_ptr();
            }
            let status = sys::llama_decode(self.context.as_ptr(), batch);
            sys::llama_synchronize(self.context.as_ptr());
            status
        };
        if status == 0 { Ok(()) } else { Err(format!("llama_decode failed with status {status}")) }
    }

    /// Appends each token to its sequence, at its position, and waits until the results are there.
    pub fn decode_in(&mut self, tokens: &[(Token, usize, usize)]) -> Result<()> {
        let n = i32::try_from(tokens.len()).map_err(|_| "too many tokens at once".to_owned())?;
        // SAFETY: the batch has room for n tokens of one sequence each, all of which are written; it is freed once.
        let status = unsafe {
            let mut batch = sys::llama_batch_init(n, 0, 1);
            batch.n_tokens = n;
            for (i, &(token, position, sequence)) in tokens.iter().enumerate() {
                *batch.token.add(i) = token;
                *batch.pos.add(i) = position as sys::llama_pos;
                *batch.n_seq_id.add(i) = 1;
                **batch.seq_id.add(i) = sequence as sys::llama_seq_id;
                *batch.logits.add(i) = 1;
            }
            let status = sys::llama_decode(self.context.as_ptr(), batch);
            sys::llama_synchronize(self.context.as_ptr());
            sys::llama_batch_free(batch);
            status
        };
        if status == 0 { Ok(()) } else { Err(format!("llama_decode failed with status {status}")) }
    }

    /// Logits of the `i`th token of the last batch (-1: its last), one for each token of the vocabulary.
    pub fn logits(&self, i: i32) -> Result<&[f32]> {
        // SAFETY: a non-null answer points at one row of vocab_size floats that stays until the next decode,
        // which needs `&mut self`.
        unsafe {
            let row = sys::llama_get_logits_ith(self.context.as_ptr(), i);
            if row.is_null() {
                return Err(format!("no logits at index {i}"));
            }
            Ok(std::slice::from_raw_parts(row, self.model.vocab_size()))
        }
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: made by llama_init_from_model, freed once, before its model.
        unsafe { sys::llama_free(self.context.as_ptr()) }
    }
}

/// The file types by the names llama-quantize gives them.
const TYPES: &[(&str, sys::llama_ftype)] = &[
    ("F32", sys::LLAMA_FTYPE_ALL_F32),
    ("F16", sys::LLAMA_FTYPE_MOSTLY_F16),
    ("BF16", sys::LLAMA_FTYPE_MOSTLY_BF16),
    ("Q4_0", sys::LLAMA_FTYPE_MOSTLY_Q4_0),
    ("Q4_1", sys::LLAMA_FTYPE_MOSTLY_Q4_1),
    ("Q5_0", sys::LLAMA_FTYPE_MOSTLY_Q5_0),
    ("Q5_1", sys::LLAMA_FTYPE_MOSTLY_Q5_1),
    ("Q8_0", sys::LLAMA_FTYPE_MOSTLY_Q8_0),
    ("Q2_K", sys::LLAMA_FTYPE_MOSTLY_Q2_K),
    ("Q3_K_S", sys::LLAMA_FTYPE_MOSTLY_Q3_K_S),
    ("Q3_K_M", sys::LLAMA_FTYPE_MOSTLY_Q3_K_M),
    ("Q3_K_L", sys::LLAMA_FTYPE_MOSTLY_Q3_K_L),
    ("Q4_K_S", sys::LLAMA_FTYPE_MOSTLY_Q4_K_S),
    ("Q4_K_M", sys::LLAMA_FTYPE_MOSTLY_Q4_K_M),
    ("Q5_K_S", sys::LLAMA_FTYPE_MOSTLY_Q5_K_S),
    ("Q5_K_M", sys::LLAMA_FTYPE_MOSTLY_Q5_K_M),
    ("Q6_K", sys::LLAMA_FTYPE_MOSTLY_Q6_K),
    ("IQ4_NL", sys::LLAMA_FTYPE_MOSTLY_IQ4_NL),
    ("IQ4_XS", sys::LLAMA_FTYPE_MOSTLY_IQ4_XS),
    ("MXFP4", sys::LLAMA_FTYPE_MOSTLY_MXFP4_MOE),
];

/// Rewrites a GGUF file in another type, also from an already quantized one; `importance` is how much each column of the
/// named tensors counts.
pub fn quantize(
    input: &Path,
    output: &Path,
    kind: &str,
    importance: Option<&[(CString, Vec<f32>)]>,
    threads: usize,
) -> Result<()> {
    let Some(&(_, ftype)) = TYPES.iter().find(|(name, _)| name.eq_ignore_ascii_case(kind)) else {
        let known: Vec<&str> = TYPES.iter().map(|t| t.0).collect();
        return Err(format!("unknown type {kind}: one of {}", known.join(", ")));
    };
    let (from, to) = (c_string(input)?, c_string(output)?);
    let entry = |(name, data): &(CString, Vec<f32>)| sys::llama_model_imatrix_data {
        name: name.as_ptr(),
        data: data.as_ptr(),
        size: data.len(),
    };
    let end = sys::llama_model_imatrix_data { name: ptr::null(), data: ptr::null(), size: 0 };
    let entries: Vec<_> = importance.unwrap_or_default().iter().map(entry).chain([end]).collect();
    // SAFETY: the names end in zero bytes and outlive the call, as do the entries, whose list ends in one without a name;
    // the parameters start from the defaults.
    let status = unsafe {
        let mut params = sys::llama_model_quantize_default_params();
        params.ftype = ftype;
        params.nthread = i32::try_from(threads).map_err(|_| "too many threads".to_owned())?;
        params.allow_requantize = true;
        if importance.is_some() {
            params.imatrix = entries.as_ptr();
        }
        sys::llama_model_quantize(from.as_ptr(), to.as_ptr(), &params)
    };
    if status == 0 { Ok(()) } else { Err(format!("{}: llama.cpp cannot quantize this file", input.display())) }
}

fn c_string(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| format!("{}: a zero byte in a name", path.display()))
}
