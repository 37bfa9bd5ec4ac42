//! Files of examples: their layouts, the chat template, and which tokens the loss falls on.
//!
//! A file goes through four stations. [`read`] knows file formats and gives one JSON object for each record, whatever
//! the format; `layout` tells by an object's fields what it teaches (a conversation, a text, ready tokens); `encode`
//! makes tokens of it, with the model's own chat template, and says which of them are learned; [`dataset`] keeps them.
//! What cannot be used is in the [`Report`], by file and line. [`batches`] hands examples out in an order that can be
//! saved and taken up again.

pub mod batches;
pub mod classes;
mod conversation;
pub mod dataset;
mod encode;
mod layout;
pub(crate) mod read;
pub mod report;
pub mod show;
mod source;

pub use batches::{Batches, Position, auto_batch_size, micro_batches};
pub use dataset::Dataset;
pub use report::{Report, Skipped};
pub use show::show;
pub use source::Source;

use anyhow::{Context, Result, bail};
use dataset::Builder;
use encode::Encoder;
use read::Record;
use rushlight_models::tokenizer::{ChatTemplate, Tokenizer};

/// What to do with a record of more tokens than a sequence may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TooLong {
    /// Keep its beginning.
    #[default]
    Cut,
    /// Leave it out.
    Skip,
}

/// How files become examples.
#[derive(Clone, Debug)]
pub struct DataSettings {
    /// Most tokens of a sequence. Texts are cut into as many sequences as they need.
    pub max_seq_len: usize,
    /// What to do with conversations of more.
    pub too_long: TooLong,
    /// Whether the loss falls on what the user and the system say, too.
    pub train_on_inputs: bool,
    /// Number of tokens that the model knows: ids from here on are refused.
    pub vocab_size: usize,
    /// The columns that hold questions and answers, where their names do not tell.
    pub columns: Option<(String, String)>,
    /// Decides which records a file with a weight that is no whole number gives once more.
    pub seed: u64,
}

/// Records that are made into tokens at a time, by all threads.
const GROUP: usize = 256;

/// The examples in `sources`, in their order.
///
/// Conversations need a `tokenizer` and a `template`, texts a `tokenizer`, and records with `input_ids` neither. `watch` is
/// told how many bytes of how many have been read, first of all that none have.
///
/// # Errors
/// For a file that cannot be read, one of a layout that needs a tokenizer or template that is not given, and one with
/// nothing that can be used; the message gives the reasons.
pub fn load(
    sources: &[Source],
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    settings: &DataSettings,
    watch: &mut dyn FnMut(u64, u64),
) -> Result<Dataset> {
    if settings.max_seq_len < 2 {
        bail!("--max-seq-len {}: a sequence needs two tokens at least", settings.max_seq_len);
    }
    if sources.is_empty() {
        bail!("no file of examples was given: name one with --data");
    }
    let encoder = Encoder { tokenizer, template, settings };
    let mut builder = Builder::default();
    let sizes: Vec<u64> = sources.iter().map(|s| std::fs::metadata(&s.path).map_or(0, |about| about.len())).collect();
    let (total, mut before) = (sizes.iter().sum(), 0);
    watch(0, total);
    for (source, size) in sources.iter().zip(sizes) {
        let done = read::Done::default();
        builder.begin(source);
        let mut group = Vec::with_capacity(GROUP);
        let unit = read::read(&source.path, &done, &mut |line, record| {
            watch(before + done.get().min(size), total);
            group.push((line, record));
            if group.len() == GROUP { encode_group(&encoder, &mut group, &mut builder) } else { Ok(()) }
        })?;
        encode_group(&encoder, &mut group, &mut builder).with_context(|| source.path.display().to_string())?;
        builder.end(unit)?;
        before += size;
    }
    Ok(builder.finish(sources, settings))
}

/// Encodes the records of `group` on all cores and adds them in their order.
fn encode_group(
    encoder: &Encoder,
    group: &mut Vec<(u64, Result<Record, String>)>,
    builder: &mut Builder,
) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let part = group.len().div_ceil(threads).max(8);
    let encode = |record: &Result<Record, String>| match record {
        Ok(record) => encoder.encode(record),
        Err(why) => Err(encode::Refusal::Skip(why.clone())),
    };
    let encoded: Vec<Vec<_>> = std::thread::scope(|scope| {
        let work: Vec<_> = group
            .chunks(part)
            .map(|records| scope.spawn(move || records.iter().map(|(_, r)| encode(r)).collect::<Vec<_>>()))
            .collect();
        work.into_iter()
            .map(|w| w.join().map_err(|_| anyhow::anyhow!("a thread that encodes examples has failed")))
            .collect::<Result<_>>()
    })?;
    for ((line, _), encoded) in group.drain(..).zip(encoded.into_iter().flatten()) {
        builder.add(line, encoded)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
