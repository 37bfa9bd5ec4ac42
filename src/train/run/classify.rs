//! Validation sets whose answers are classes: how often the likeliest of them is the right one.

use super::Lesson;
use crate::train::batch::Example;
use crate::train::data::classes::{Confusion, Metrics, answered, classes};
use crate::train::data::{Dataset, micro_batches};
use anyhow::{Result, ensure};
use std::collections::BTreeMap;

/// Questions whose answers are classes.
#[derive(Clone, Debug)]
pub struct Classification {
    /// The tokens of each class's answer.
    classes: Vec<Vec<u32>>,
    /// What a person calls them.
    names: Vec<String>,
    /// The tokens of each question, and the class of its answer.
    questions: Vec<(Vec<u32>, usize)>,
}

impl Classification {
    /// The questions of `validation`, with the classes of `train`; `name` spells a class's tokens.
    ///
    /// # Errors
    /// When the answers are no classes.
    pub fn new(train: &Dataset, validation: &Dataset, name: impl Fn(&[u32]) -> String) -> Result<Classification> {
        let classes = classes(train).unwrap_or_default();
        ensure!(
            classes.len() > 1,
            "--compute-classification-metrics: the examples are no classification: each needs one short answer, and there \
             are to be far fewer different answers than examples"
        );
        let (mut questions, mut others) = (Vec::new(), BTreeMap::<String, usize>::new());
        for item in 0..validation.len() {
            let Some((question, answer)) = validation.question(item) else { continue };
            match classes.iter().position(|c| c == answer) {
                Some(class) => questions.push((question.to_vec(), class)),
                None => *others.entry(name(answer)).or_default() += 1,
            }
        }
        if !others.is_empty() {
            let named: Vec<String> = others.keys().take(8).map(|name| format!("'{name}'")).collect();
            tracing::warn!(
                "{} examples to validate on are not measured, as their classes are not among those learned: {}{}",
                others.values().sum::<usize>(),
                named.join(", "),
                if others.len() > named.len() { ", ..." } else { "" }
            );
        }
        ensure!(
            !questions.is_empty(),
            "--compute-classification-metrics: no answer of the validation set is among those of the examples"
        );
        let names = classes.iter().map(|c| name(c)).collect();
        Ok(Classification { classes, names, questions })
    }

    /// How the model classifies now: by the answer of the lowest loss. `rows` go through the model together.
    pub fn metrics(&self, lesson: &mut dyn Lesson, rows: usize) -> Result<Metrics> {
        let mut pairs = Vec::with_capacity(self.questions.len());
        for (question, right) in &self.questions {
            let tries: Vec<Example> = self.classes.iter().map(|class| answered(question, class)).collect();
            let mut sums = Vec::with_capacity(tries.len());
            for group in micro_batches(&tries, rows) {
                sums.extend(lesson.losses(&tries[group])?.into_iter().map(|loss| loss.sum));
            }
            pairs.push((*right, (0..sums.len()).min_by(|&a, &b| sums[a].total_cmp(&sums[b]))));
        }
        Ok(Confusion::new(&self.names, pairs).metrics())
    }
}
