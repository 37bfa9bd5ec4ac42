//! The worker team: hands out short parallel steps in microseconds.

mod stretches;

use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use stretches::{Ahead, Stretches};

/// A token of a small model is hundreds of steps of a few microseconds each: a worker that has run out of work looks
/// this many times for the next step (some 200 microseconds) before it goes to sleep.
const SPINS: u32 = 4000;

/// Set in `Shared::gate` when the step takes no more workers.
const CLOSED: u64 = 1 << 31;

/// `Shared::next` of a step whose tasks are taken from [`Stretches`].
const IN_STRETCHES: usize = usize::MAX;

type Step = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Upper half: number of the step. Lower half: how many workers joined it, and `CLOSED`.
    gate: AtomicU64,
    step: UnsafeCell<Option<Step>>,
    tasks: AtomicUsize,
    /// The next task, or `IN_STRETCHES`.
    next: AtomicUsize,
    stretches: Stretches,
    ahead: Ahead,
    left: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    alarm: Condvar,
}

// SAFETY: `step` is written only while the gate is closed, and read only by workers that joined through the gate.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A fixed team of threads, the caller among them. A step is a number of tasks; a free thread takes the next one, so
/// what a task computes must not depend on who runs it.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Team {
    /// A team of `threads` (at least one: the caller).
    pub fn new(threads: usize) -> Team {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(CLOSED),
            step: UnsafeCell::new(None),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            stretches: Stretches::new(threads),
            ahead: Ahead::new(threads),
            left: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            alarm: Condvar::new(),
        });
        let workers = (1..threads)
            .map_while(|i| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("worker-{i}")).spawn(move || work(&shared, i)).ok()
            })
            .collect();
        Team { shared, workers, turn: Mutex::new(()) }
    }

    /// Threads in the team, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for each `i < tasks` and returns when all have finished. A step inside a step runs on the
    /// thread that asks for it.
    ///
    /// # Panics
    /// When a task panicked.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.step(tasks, false, task);
    }

    /// [`Team::run`] for tasks that lie one behind another in memory: each thread takes those of a stretch of its own,
    /// in their order, so that what it fetches ahead is what it takes next; one that has finished its stretch takes
    /// from the ends of the others'.
    ///
    /// # Panics
    /// When a task panicked.
    pub fn run_in_stretches(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.step(tasks, true, task);
    }

    /// The first task of each thread's stretch of `tasks`.
    pub(crate) fn stretches(&self, tasks: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let threads = self.shared.stretches.len();
        (0..threads).map(move |i| stretches::first(tasks, threads, i))
    }

    /// Where the memory begins that each thread will probably read when the next steps have passed: threads that wait
    /// have some of it fetched meanwhile. Empty: nowhere.
    pub(crate) fn look_ahead(&self, starts: &[usize]) {
        self.shared.ahead.set(starts);
    }

    fn step(&self, tasks: usize, in_stretches: bool, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            (0..tasks).for_each(task);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; no worker holds the reference after this function returns.
        let step = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Step>(task) };
        // SAFETY: the gate is closed and every worker that had joined has left: nobody else looks at the cell.
        unsafe { *shared.step.get() = Some(step) };
        shared.tasks.store(tasks, Ordering::Relaxed);
        shared.next.store(if in_stretches { IN_STRETCHES } else { 0 }, Ordering::Relaxed);
        if in_stretches {
            shared.stretches.lay_out(tasks);
        }
        shared.left.store(0, Ordering::Relaxed);
        let number = (shared.gate.load(Ordering::Relaxed) >> 32).wrapping_add(1) << 32;
        shared.gate.store(number, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(shared.bed.lock());
            shared.alarm.notify_all();
        }
        INSIDE.set(true);
        let mine = catch_unwind(AssertUnwindSafe(|| take_tasks(shared, 0, task)));
        INSIDE.set(false);
        if mine.is_err() {
            shared.drop_tasks();
        }
        let joined = (shared.gate.fetch_or(CLOSED, Ordering::AcqRel) & (CLOSED - 1)) as usize;
        let mut looks = 0u32;
        while shared.left.load(Ordering::Acquire) != joined {
            if !shared.ahead.fetch(0) {
                wait_a_little(&mut looks);
            }
        }
        let theirs = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!theirs, "a worker thread panicked");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.bed.lock());
        self.shared.alarm.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn wait_a_little(looks: &mut u32) {
    *looks += 1;
    if looks.is_multiple_of(256) {
        // On a machine with more work than cores the one we wait for may be waiting for us.
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

impl Shared {
    /// Leaves no task to be taken.
    fn drop_tasks(&self) {
        if self.next.load(Ordering::Relaxed) == IN_STRETCHES {
            self.stretches.lay_out(0);
        } else {
            self.next.store(usize::MAX / 2, Ordering::Relaxed);
        }
    }
}

/// Takes tasks as thread `me` until there are none.
fn take_tasks(shared: &Shared, me: usize, task: &(dyn Fn(usize) + Sync)) {
    if shared.next.load(Ordering::Relaxed) == IN_STRETCHES {
        while let Some(i) = shared.stretches.take(me) {
            task(i);
        }
        return;
    }
    let tasks = shared.tasks.load(Ordering::Relaxed);
    loop {
        let i = shared.next.fetch_add(1, Ordering::Relaxed);
        if i >= tasks {
            return;
        }
        task(i);
    }
}

fn work(shared: &Shared, me: usize) {
    INSIDE.set(true);
    let mut done = 0u64;
    loop {
        let mut looks = 0u32;
        let gate = loop {
            let gate = shared.gate.load(Ordering::Acquire);
            if gate >> 32 != done && gate & CLOSED == 0 {
                break gate;
            }
            if shared.stop.load(Ordering::Relaxed) {
                return;
            }
            if shared.ahead.fetch(me) {
                continue;
            }
            if looks < SPINS {
                wait_a_little(&mut looks);
                continue;
            }
            let bed = shared.bed.lock().unwrap_or_else(|e| e.into_inner());
            shared.sleepers.fetch_add(1, Ordering::SeqCst);
            let gate = shared.gate.load(Ordering::SeqCst);
            let nothing = gate >> 32 == done || gate & CLOSED != 0;
            if nothing && !shared.stop.load(Ordering::SeqCst) {
                drop(shared.alarm.wait(bed));
            }
            shared.sleepers.fetch_sub(1, Ordering::SeqCst);
            looks = 0;
        };
        if shared.gate.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            continue;
        }
        done = gate >> 32;
        // SAFETY: having joined, this worker is waited for before the cell is written again or `run` returns.
        let step = unsafe { (*shared.step.get()).map(|step| &*step) };
        if let Some(task) = step
            && catch_unwind(AssertUnwindSafe(|| take_tasks(shared, me, task))).is_err()
        {
            shared.drop_tasks();
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.left.fetch_add(1, Ordering::Release);
    }
}

/// A mutable slice that tasks of one step write to in disjoint places.
pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: `slice` requires its callers to keep to disjoint ranges.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Shares `slice` among tasks.
    pub fn new(slice: &'a mut [T]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), life: std::marker::PhantomData }
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No two tasks ask for overlapping ranges while either is in use.
    ///
    /// # Panics
    /// When the range is not inside the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "range outside of the shared slice");
        // SAFETY: in bounds by the assertion, disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Where `range` begins, for what writes some of it while other tasks write the rest.
    ///
    /// # Panics
    /// When the range is not inside the slice.
    pub fn pointer(&self, range: std::ops::Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.len, "range outside of the shared slice");
        self.start.wrapping_add(range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads_and_tasks() {
        for threads in [1, 2, 3, 7] {
            let team = Team::new(threads);
            assert_eq!(team.threads(), threads);
            for tasks in [0, 1, 2, 5, 64, 1000] {
                for turn in 0..40 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    team.step(tasks, turn % 2 == 1, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn a_sleeping_team_wakes_up() {
        let team = Team::new(3);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(30));
            let sum = AtomicUsize::new(0);
            team.run(100, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn steps_inside_steps_and_from_several_threads_finish() {
        let team = Team::new(3);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    team.run(10, &|_| {
                        team.run(10, &|i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        })
                    })
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 10 * 45);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let team = Team::new(4);
        for turn in 0..20 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                team.step(50, turn % 2 == 1, &|i| {
                    if i == 25 {
                        std::panic::resume_unwind(Box::new("on purpose"));
                    }
                })
            }));
            assert!(caught.is_err());
            let sum = AtomicUsize::new(0);
            team.run(10, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }
}
