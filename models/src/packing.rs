//! Matrices that checkpoints store as one, and how they come apart: queries, keys and values; gate and up; the two parts
//! of a latent vector.

use crate::families::Role;
use crate::model::{Vector, Weight};
use crate::spec::ModelSpec;
use std::ops::Range;

/// How the rows of several matrices stand in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// One behind the other.
    Stacked,
    /// For each key head its queries, its key and its value; for gate and up, a row of each in turn.
    Grouped,
}

/// Some rows of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Neighbours, which can be used where they lie.
    Range(Range<usize>),
    /// Scattered ones, which have to be copied.
    Order(Vec<usize>),
}

impl Rows {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Rows::Range(range) => range.len(),
            Rows::Order(order) => order.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those rows of `weight`, in place where they are neighbours. `None` where it has not so many.
    pub fn of(&self, weight: &Weight) -> Option<Weight> {
        match self {
            Rows::Range(range) => weight.row_range(range.clone()),
            Rows::Order(order) => order.iter().all(|&r| r < weight.rows()).then(|| weight.with_rows(order)),
        }
    }

    /// Those values of `vector`.
    pub fn of_vector(&self, vector: &Vector) -> Vector {
        Vector { id: vector.id, values: self.of_values(&vector.values) }
    }

    /// Those of `values`.
    pub fn of_values(&self, values: &[f32]) -> Vec<f32> {
        match self {
            Rows::Range(range) => values[range.clone()].to_vec(),
            Rows::Order(order) => order.iter().map(|&i| values[i]).collect(),
        }
    }
}

/// The role whose tensor may hold the matrix of `role` together with others.
pub fn packed_in(role: Role, spec: &ModelSpec) -> Option<Role> {
    match role {
        Role::K | Role::V if spec.latent.is_some() => Some(Role::KvLatent),
        Role::Q | Role::K | Role::V => Some(Role::Qkv),
        Role::Gate | Role::Up => Some(Role::GateUp),
        Role::SharedGate | Role::SharedUp => Some(Role::SharedGateUp),
        Role::ExpertGate(i) | Role::ExpertUp(i) => Some(Role::ExpertGateUp(i)),
        _ => None,
    }
}

/// What the packed matrix `role` of a layer consists of; empty for other roles.
pub fn parts(role: Role, packing: Packing, spec: &ModelSpec, layer: usize) -> Vec<(Role, Rows)> {
    let pair = |gate: Role, up: Role, width: usize| match packing {
        Packing::Stacked => stacked(&[(gate, width), (up, width)]),
        Packing::Grouped => grouped(&[(gate, 1), (up, 1)], width),
    };
    let Some(this) = spec.layers.get(layer) else { return Vec::new() };
    let dense = this.mlp.as_ref().map_or(0, |mlp| mlp.width);
    match (role, &spec.latent) {
        (Role::KvLatent, Some(latent)) => stacked(&[(Role::V, latent.kv), (Role::K, latent.rotated)]),
        (Role::Qkv, None) => match packing {
            Packing::Stacked => {
                stacked(&[(Role::Q, spec.query_width()), (Role::K, spec.kv_width()), (Role::V, spec.value_width())])
            }
            Packing::Grouped => {
                let queries = spec.query_width() / spec.kv_heads;
                grouped(&[(Role::Q, queries), (Role::K, spec.head_dim), (Role::V, spec.value_dim)], spec.kv_heads)
            }
        },
        (Role::GateUp, _) => pair(Role::Gate, Role::Up, dense),
        (Role::SharedGateUp, _) => pair(Role::SharedGate, Role::SharedUp, dense),
        (Role::ExpertGateUp(i), _) => {
            pair(Role::ExpertGate(i), Role::ExpertUp(i), this.experts.as_ref().map_or(0, |e| e.mlp.width))
        }
        _ => Vec::new(),
    }
}

fn stacked(parts: &[(Role, usize)]) -> Vec<(Role, Rows)> {
    let mut start = 0;
    let each = parts.iter().map(|&(role, rows)| {
        let range = start..start + rows;
        start = range.end;
        (role, Rows::Range(range))
    });
    each.collect()
}

/// `groups` times so many rows of each part.
fn grouped(parts: &[(Role, usize)], groups: usize) -> Vec<(Role, Rows)> {
    if groups == 1 {
        return stacked(parts);
    }
    let size: usize = parts.iter().map(|(_, rows)| rows).sum();
    let mut start = 0;
    let each = parts.iter().map(|&(role, rows)| {
        let first = start;
        start += rows;
        let order = (0..groups).flat_map(|g| (0..rows).map(move |r| g * size + first + r));
        (role, Rows::Order(order.collect()))
    });
    each.collect()
}
