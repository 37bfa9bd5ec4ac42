//! The pickles in which PyTorch describes tensors, and no others. A pickle is a program for a machine with a stack; this
//! machine has the few instructions that make dictionaries of tensors, and nothing that calls what the file names.

use std::collections::HashMap;

/// Most instructions of a pickle: far more than any model's needs.
const MOST_STEPS: usize = 20_000_000;
/// Most dimensions of a tensor.
const MOST_DIMS: usize = 8;

/// A tensor as a pickle describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Described {
    /// The name of its storage: a file in the archive.
    pub storage: String,
    /// The class of its storage, such as `HalfStorage`.
    pub class: String,
    /// The storage's number of elements.
    pub elements: usize,
    /// Where it begins there, in elements.
    pub offset: usize,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// Distance of neighbours along each dimension, in elements.
    pub stride: Vec<usize>,
}

/// What stands on the stack. Larger things lie in the machine's lists, so that nothing here nests.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    None,
    Bool(bool),
    Int(i64),
    Text(usize),
    Tuple { start: usize, len: usize },
    List,
    Dict(usize),
    Global(usize),
    Storage(usize),
    Tensor(usize),
}

/// The machine.
struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    texts: Vec<String>,
    tuples: Vec<Value>,
    dicts: Vec<Vec<(Value, Value)>>,
    /// Module and name.
    globals: Vec<(String, String)>,
    /// Class, name and number of elements.
    storages: Vec<(String, String, usize)>,
    tensors: Vec<Described>,
}

type Outcome<T> = Result<T, String>;

/// The tensors of the dictionary that the pickle `code` describes, by name.
pub(super) fn read(code: &[u8]) -> Outcome<Vec<(String, Described)>> {
    let (stack, marks, memo, texts, tuples) = Default::default();
    let (dicts, globals, storages, tensors) = Default::default();
    let mut machine = Machine { code, at: 0, stack, marks, memo, texts, tuples, dicts, globals, storages, tensors };
    let Value::Dict(dict) = machine.run()? else {
        return Err("its pickle is not a dictionary of tensors".into());
    };
    let entries = machine.dicts.get(dict).cloned().unwrap_or_default();
    let each = entries.into_iter().map(|(key, value)| match (key, value) {
        (Value::Text(name), Value::Tensor(tensor)) => {
            Ok((machine.texts[name].clone(), machine.tensors[tensor].clone()))
        }
        (Value::Text(name), _) => Err(format!(
            "'{}' is not a tensor: a checkpoint of a training run, not a model; save the model alone",
            machine.texts[name]
        )),
        _ => Err("a key of its dictionary is not a name".into()),
    });
    each.collect()
}

impl Machine<'_> {
    fn run(&mut self) -> Outcome<Value> {
        for _ in 0..MOST_STEPS {
            let op = self.byte()?;
            if op == b'.' {
                return self.pop();
            }
            self.step(op)?;
        }
        Err(format!("its pickle has more than {MOST_STEPS} instructions"))
    }

    fn step(&mut self, op: u8) -> Outcome<()> {
        match op {
            0x80 => drop(self.take(1)?), // protocol
            0x95 => drop(self.take(8)?), // frame
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' | b'M' | b'J' => {
                let n = match op {
                    b'K' => self.number(1)?,
                    b'M' => self.number(2)?,
                    // The only one of these with a sign.
                    _ => i64::from(self.number(4)? as u32 as i32),
                };
                self.stack.push(Value::Int(n));
            }
            0x8a => {
                let len = self.number(1)? as usize;
                let bytes = self.take(len)?;
                if len > 8 {
                    return Err("its pickle holds a number that is too long".into());
                }
                let sign = bytes.last().is_some_and(|b| b & 0x80 != 0);
                let mut all = [if sign { 0xff } else { 0 }; 8];
                all[..len].copy_from_slice(bytes);
                self.stack.push(Value::Int(i64::from_le_bytes(all)));
            }
            b'X' | 0x8c => {
                let len = self.number(if op == b'X' { 4 } else { 1 })? as usize;
                let text = std::str::from_utf8(self.take(len)?).map(str::to_owned);
                self.texts.push(text.map_err(|_| "its pickle holds text that is not UTF-8")?);
                self.stack.push(Value::Text(self.texts.len() - 1));
            }
            b'}' => {
                self.dicts.push(Vec::new());
                self.stack.push(Value::Dict(self.dicts.len() - 1));
            }
            b']' => self.stack.push(Value::List),
            b')' => self.stack.push(Value::Tuple { start: 0, len: 0 }),
            b'(' => self.marks.push(self.stack.len()),
            b't' => {
                let items = self.above_mark()?;
                self.tuple(&items);
            }
            0x85..=0x87 => {
                let from = self.stack.len().checked_sub(usize::from(op - 0x84)).ok_or("its pickle is damaged")?;
                let items = self.stack.split_off(from);
                self.tuple(&items);
            }
            b'q' | b'r' | 0x94 => {
                let slot = match op {
                    b'q' => self.number(1)? as u64,
                    b'r' => self.number(4)? as u64,
                    _ => self.memo.len() as u64,
                };
                let top = *self.stack.last().ok_or("its pickle is damaged")?;
                self.memo.insert(slot, top);
            }
            b'h' | b'j' => {
                let slot = self.number(if op == b'h' { 1 } else { 4 })? as u64;
                let value = *self.memo.get(&slot).ok_or("its pickle refers to what it has not kept")?;
                self.stack.push(value);
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (module, name) = (self.text(module)?.to_owned(), self.text(name)?.to_owned());
                self.global(module, name)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?;
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.put(&[key, value])?;
            }
            b'u' => {
                let items = self.above_mark()?;
                self.put(&items)?;
            }
            // Lists and attributes of dictionaries carry nothing that is wanted.
            b'a' | b'b' => drop(self.pop()?),
            b'e' => drop(self.above_mark()?),
            other => {
                return Err(format!("its pickle has the instruction {other:#04x}, which tensors do not need: refused"));
            }
        }
        Ok(())
    }

    /// What the file names. Only names that stand for parts of tensors are known, and none of them is called.
    fn global(&mut self, module: String, name: String) -> Outcome<()> {
        let known = match &module[..] {
            "collections" => name == "OrderedDict",
            "torch._utils" => matches!(&name[..], "_rebuild_tensor_v2" | "_rebuild_parameter"),
            "torch" => name.ends_with("Storage"),
            _ => false,
        };
        if !known {
            return Err(format!("it would run {module}.{name} when loaded, which tensors do not need: refused"));
        }
        self.globals.push((module, name));
        self.stack.push(Value::Global(self.globals.len() - 1));
        Ok(())
    }

    /// `('storage', class, key, location, elements)`.
    fn storage(&mut self, id: Value) -> Outcome<()> {
        let &[kind, Value::Global(class), key, _, Value::Int(elements)] = self.items(id)? else {
            return Err("its pickle describes a storage in a way that is not understood".into());
        };
        let storage = (self.text(kind)? == "storage" && self.globals[class].0 == "torch")
            .then(|| {
                Some((self.globals[class].1.clone(), self.text(key).ok()?.to_owned(), usize::try_from(elements).ok()?))
            })
            .flatten();
        self.storages.push(storage.ok_or("its pickle describes a storage in a way that is not understood")?);
        self.stack.push(Value::Storage(self.storages.len() - 1));
        Ok(())
    }

    fn call(&mut self, function: Value, arguments: Value) -> Outcome<()> {
        let Value::Global(function) = function else { return Err("its pickle calls what is no function".into()) };
        let made = match &self.globals[function].1[..] {
            "OrderedDict" => {
                self.dicts.push(Vec::new());
                Some(Value::Dict(self.dicts.len() - 1))
            }
            "_rebuild_parameter" => self.items(arguments)?.first().copied(),
            "_rebuild_tensor_v2" => self.tensor(arguments)?,
            _ => None,
        };
        self.stack.push(made.ok_or("its pickle describes a tensor in a way that is not understood")?);
        Ok(())
    }

    /// `(storage, offset, shape, stride, ...)`; `None` where it is something else.
    fn tensor(&mut self, arguments: Value) -> Outcome<Option<Value>> {
        let &[Value::Storage(storage), Value::Int(offset), shape, stride, ..] = self.items(arguments)? else {
            return Ok(None);
        };
        let (Some(shape), Some(stride)) = (self.sizes(shape)?, self.sizes(stride)?) else { return Ok(None) };
        let Some(offset) = usize::try_from(offset).ok().filter(|_| shape.len() == stride.len()) else {
            return Ok(None);
        };
        let (class, storage, elements) = self.storages[storage].clone();
        self.tensors.push(Described { storage, class, elements, offset, shape, stride });
        Ok(Some(Value::Tensor(self.tensors.len() - 1)))
    }

    fn sizes(&self, tuple: Value) -> Outcome<Option<Vec<usize>>> {
        let items = self.items(tuple)?;
        let each = items.iter().map(|v| match v {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        });
        Ok(each.collect::<Option<Vec<usize>>>().filter(|sizes| sizes.len() <= MOST_DIMS))
    }

    fn put(&mut self, items: &[Value]) -> Outcome<()> {
        let Some(&Value::Dict(dict)) = self.stack.last() else { return Err("its pickle is damaged".into()) };
        let (pairs, []) = items.as_chunks::<2>() else { return Err("its pickle is damaged".into()) };
        self.dicts[dict].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn tuple(&mut self, items: &[Value]) {
        let start = self.tuples.len();
        self.tuples.extend_from_slice(items);
        self.stack.push(Value::Tuple { start, len: items.len() });
    }

    fn items(&self, tuple: Value) -> Outcome<&[Value]> {
        match tuple {
            Value::Tuple { start, len } => Ok(&self.tuples[start..start + len]),
            _ => Err("its pickle is damaged".into()),
        }
    }

    fn text(&self, value: Value) -> Outcome<&str> {
        match value {
            Value::Text(text) => Ok(&self.texts[text]),
            _ => Err("its pickle is damaged".into()),
        }
    }

    fn above_mark(&mut self) -> Outcome<Vec<Value>> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len());
        Ok(self.stack.split_off(mark.ok_or("its pickle is damaged")?))
    }

    fn pop(&mut self) -> Outcome<Value> {
        self.stack.pop().ok_or_else(|| "its pickle is damaged".into())
    }

    fn byte(&mut self) -> Outcome<u8> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned number of `bytes` bytes.
    fn number(&mut self, bytes: usize) -> Outcome<i64> {
        let mut all = [0; 8];
        all[..bytes].copy_from_slice(self.take(bytes)?);
        Ok(i64::from_le_bytes(all))
    }

    fn line(&mut self) -> Outcome<String> {
        let rest = &self.code[self.at..];
        let len = rest.iter().take(1000).position(|&b| b == b'\n').ok_or("its pickle is damaged")?;
        let text = String::from_utf8_lossy(&rest[..len]).into_owned();
        self.at += len + 1;
        Ok(text)
    }

    fn take(&mut self, len: usize) -> Outcome<&[u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.code.len());
        let bytes = &self.code[self.at..end.ok_or("its pickle ends too early")?];
        self.at += len;
        Ok(bytes)
    }
}
