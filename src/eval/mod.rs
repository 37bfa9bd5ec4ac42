//! Multiple-choice questions, asked and scored as EleutherAI's lm-evaluation-harness does: the model reads the question,
//! and the answer is the choice whose text it finds likeliest behind it.

pub mod find;
mod names;
mod prompt;
pub mod read;
pub mod result;
pub mod score;

/// A question as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What stands before the choice, without a space at the end.
    pub prompt: String,
    /// The texts that are compared; each follows the prompt after a space.
    pub choices: Vec<String>,
    /// Which of them is right.
    pub answer: usize,
    /// File and line, for people.
    pub place: String,
}

/// Questions with one introduction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// What stands before everything else.
    pub description: String,
    /// Questions that are shown with their answers.
    pub examples: Vec<Item>,
    /// Questions that are asked.
    pub items: Vec<Item>,
    /// Whether choices are texts of different lengths, so that the accuracy by likelihood per character says more.
    pub texts: bool,
}

impl Subject {
    /// What stands before the choices of `item`: the description, the examples with their answers, the question.
    pub fn context(&self, item: &Item) -> String {
        let mut context = self.description.clone();
        for example in &self.examples {
            context.push_str(&format!("{} {}\n\n", example.prompt, example.choices[example.answer]));
        }
        context.push_str(&item.prompt);
        context
    }
}
