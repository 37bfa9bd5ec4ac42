//! Questions in the words of lm-evaluation-harness's tasks.

use super::Item;
use super::names::{CEVAL, CMMLU};
use regex::Regex;
use std::sync::LazyLock;

/// Whose words a question is put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// Choices behind letters; the letter is the answer. The tasks `mmlu`.
    English,
    /// The same of the tasks `ceval-valid`.
    CEval,
    /// The same of the tasks `cmmlu`.
    Cmmlu,
    /// The text of a choice is the answer: the tasks `arc`.
    Text,
    /// A scene and how it may go on: the task `hellaswag`.
    HellaSwag,
}

impl Words {
    /// What stands before all questions of `subject`; `None` where a file has none.
    pub fn description(self, subject: Option<&str>) -> String {
        let named = |names: &[(&str, &'static str)]| {
            let known = names.iter().find(|(name, _)| Some(*name) == subject);
            known.map_or_else(|| subject.unwrap_or("各学科").replace('_', " "), |(_, chinese)| (*chinese).to_owned())
        };
        match self {
            Words::English => {
                let about = subject.map_or(String::new(), |subject| format!(" about {}", subject.replace('_', " ")));
                format!("The following are multiple choice questions (with answers){about}.\n\n")
            }
            Words::CEval => format!("以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n", named(CEVAL)),
            Words::Cmmlu => {
                format!("以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", named(CMMLU))
            }
            Words::Text | Words::HellaSwag => String::new(),
        }
    }

    /// Whether the texts of choices are compared, rather than their letters.
    pub fn texts(self) -> bool {
        matches!(self, Words::Text | Words::HellaSwag)
    }

    /// The question as the model reads it.
    pub fn item(self, question: &str, choices: &[String], answer: usize, place: String) -> Item {
        let letters = || (0..choices.len()).map(letter);
        let (prompt, choices) = match self {
            Words::English | Words::CEval | Words::Cmmlu => {
                let mut prompt = format!("{}\n", question.trim());
                letters().zip(choices).for_each(|(letter, choice)| prompt.push_str(&format!("{letter}. {choice}\n")));
                prompt.push_str(if self == Words::English { "Answer:" } else { "答案：" });
                (prompt, letters().collect())
            }
            Words::Text => (format!("Question: {question}\nAnswer:"), choices.to_vec()),
            Words::HellaSwag => (tidy(question), choices.iter().map(|choice| tidy(choice)).collect()),
        };
        Item { prompt, choices, answer, place }
    }
}

/// `A` for 0.
fn letter(i: usize) -> String {
    char::from(b'A' + (i % 26) as u8).to_string()
}

/// HellaSwag's scene: what is done, and how it begins.
pub fn scene(activity: &str, first: &str, second: &str) -> String {
    // As Python capitalizes: one large letter, and the others small.
    let mut letters = second.chars();
    let capital = letters.next().map(|c| c.to_uppercase().collect::<String>()).unwrap_or_default();
    format!("{activity}: {first} {capital}{}", letters.as_str().to_lowercase())
}

/// Without the marks that WikiHow's pages have left in HellaSwag.
fn tidy(text: &str) -> String {
    static MARKS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\[.*?\]").ok());
    let text = text.trim().replace(" [title]", ". ");
    let text = MARKS.as_ref().map_or(text.clone(), |marks| marks.replace_all(&text, "").into_owned());
    text.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Subject;

    fn four(words: Words) -> Item {
        let choices = ["one", "two", "3.5", " four "].map(str::to_owned);
        words.item(" How many?\n", &choices, 2, String::new())
    }

    #[test]
    fn letters_in_english() {
        let item = four(Words::English);
        assert_eq!(item.prompt, "How many?\nA. one\nB. two\nC. 3.5\nD.  four \nAnswer:");
        assert_eq!(item.choices, ["A", "B", "C", "D"]);
        let subject = Subject {
            name: "abstract_algebra".into(),
            description: Words::English.description(Some("abstract_algebra")),
            examples: vec![item.clone()],
            items: Vec::new(),
            texts: false,
        };
        assert_eq!(
            subject.context(&item),
            "The following are multiple choice questions (with answers) about abstract algebra.\n\n\
             How many?\nA. one\nB. two\nC. 3.5\nD.  four \nAnswer: C\n\n\
             How many?\nA. one\nB. two\nC. 3.5\nD.  four \nAnswer:"
        );
    }

    #[test]
    fn letters_in_chinese() {
        assert_eq!(four(Words::CEval).prompt, "How many?\nA. one\nB. two\nC. 3.5\nD.  four \n答案：");
        assert_eq!(
            Words::CEval.description(Some("computer_network")),
            "以下是中国关于计算机网络的单项选择题，请选出其中的正确答案。\n\n"
        );
        assert_eq!(
            Words::Cmmlu.description(Some("college_law")),
            "以下是关于大学法律的单项选择题，请直接给出正确答案的选项。\n\n"
        );
        assert_eq!(Words::Cmmlu.description(Some("new_thing")).matches("new thing").count(), 1);
    }

    #[test]
    fn scenes() {
        let scene = scene("Making a cake", "[header] How to bake [title] Mix the eggs.  ", "the Cook stirs");
        let item = Words::HellaSwag.item(&scene, &[" [step] and   eats. ".into(), "B".into()], 0, String::new());
        // What the harness's own preprocessing gives, odd spaces and all.
        assert_eq!(item.prompt, "Making a cake: How to bake. Mix the eggs.  The cook stirs");
        assert_eq!(item.choices, [" and  eats.", "B"]);
    }

    #[test]
    fn texts() {
        let item = four(Words::Text);
        assert_eq!(item.prompt, "Question:  How many?\n\nAnswer:");
        assert_eq!(item.choices[3], " four ");
        assert!(Words::Text.texts() && !Words::CEval.texts());
    }
}
