use crate::kernels::{Isa, Kernels};
use crate::matmul::{Order, PromptRounding};
use crate::threads::Team;
use std::sync::{Mutex, OnceLock};

/// This machine's processor as the rest of the crate uses it: the worker team and the kernels of one instruction set.
/// The operations are in [`crate::matmul`] and [`crate::ops`].
pub struct Cpu {
    pub(crate) team: Team,
    pub(crate) kernels: Kernels,
    pub(crate) prompt_rounding: PromptRounding,
    pub(crate) half_attention: bool,
    pub(crate) coarse_floats: bool,
    pub(crate) order: Mutex<Order>,
    /// Bytes of operands that stay near a core. Only a matrix unit is faster than what brings the others, so that
    /// elsewhere there is no end to them.
    pub(crate) near: usize,
}

impl Cpu {
    /// A team of `threads` with the kernels of `isa` (the scalar ones where this machine lacks it).
    pub fn new(threads: usize, isa: Isa) -> Cpu {
        Cpu {
            team: Team::new(threads),
            kernels: isa.kernels(),
            prompt_rounding: PromptRounding::default(),
            half_attention: false,
            coarse_floats: false,
            order: Mutex::default(),
            near: if isa == Isa::Amx { second_cache() / 4 * 3 } else { usize::MAX },
        }
    }

    /// The same, with prompts rounded as `rounding` says.
    pub fn with_prompt_rounding(mut self, rounding: PromptRounding) -> Cpu {
        self.prompt_rounding = rounding;
        self
    }

    /// The same, which rounds weights of F32, F16 and BF16 to bf16 as it does those of block formats, with what they meet,
    /// where many rows of that are faster than f32. For looking at what goes through a model, not for its answers.
    pub fn with_coarse_floats(mut self, coarse: bool) -> Cpu {
        self.coarse_floats = coarse;
        self
    }

    /// The same, whose attention in training ([`Cpu::attention_train`] and its gradients) rounds the sides of its products
    /// to bf16 where the processor multiplies that faster than f32. For models whose weights are coarser than that.
    pub fn with_half_attention(mut self, half: bool) -> Cpu {
        self.half_attention = half;
        self
    }

    /// What [`Cpu::with_half_attention`] was told.
    pub fn half_attention(&self) -> bool {
        self.half_attention
    }

    /// Threads in the team, the caller included.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// The instruction set whose kernels are in use.
    pub fn isa(&self) -> Isa {
        self.kernels.isa
    }

    /// The worker team.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// Calls `work` with ranges that cover `0..items`, each a multiple of `grain` long but the last. Small jobs stay
    /// on the calling thread.
    pub(crate) fn split(&self, items: usize, grain: usize, work: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        let tasks = items.div_ceil(grain.max(1));
        self.team.run(tasks, &|i| work(i * grain..items.min((i + 1) * grain)));
    }
}

/// Physical cores of this machine that this process may use; at least 1.
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    let siblings = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
        .map_or(1, |s| s.trim().split([',', '-']).count().clamp(1, 8));
    logical.div_ceil(siblings)
}

/// Bytes of a core's second-nearest cache; a mebibyte where the system does not say.
fn second_cache() -> usize {
    static ANSWER: OnceLock<usize> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size").ok();
        let kilobytes = size.and_then(|s| s.trim().strip_suffix('K')?.parse::<usize>().ok());
        kilobytes.map_or(1 << 20, |k| (k << 10).clamp(256 << 10, 4 << 20))
    })
}
