//! What a program says about its plan when it is to take over a running job, and whether it may.
//!
//! What must be equal: everything that lies in shared memory or on its way between workers: stages
//! and their workers, edges and the records on them, sources, sinks and operators with state by
//! uid, their keys and values, where every segment lies. What may differ: code, names, operators
//! between two exchanges that keep nothing; a process operator may declare more states, or fewer;
//! values may be of another type where the new program says how they are migrated.
//!
//! `inspect` makes descriptions in processes of both programs; `supervisor/update.rs` compares
//! them.

use super::{Grouping, OperatorSpec, Plan};
use crate::control::protocol::Change;
use serde::{Deserialize, Serialize};
use testudo_shm::header::LAYOUT_VERSION;

/// A type, by name and layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Type {
    pub(crate) name: String,
    pub(crate) schema: u64,
}

/// A plan, as far as another program must agree with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Described {
    /// Version of the shared layouts: of segments, and of key groups.
    pub(crate) layouts: (u32, u32),
    /// The library's.
    pub(crate) version: String,
    pub(crate) workers: usize,
    pub(crate) key_groups: usize,
    pub(crate) arena_bytes: usize,
    /// Hash of what must be equal, as workers compare it.
    pub(crate) hash: u64,
    pub(crate) stages: Vec<Stage>,
    pub(crate) edges: Vec<Edge>,
    pub(crate) operators: Vec<Operator>,
    pub(crate) counters: Vec<String>,
    pub(crate) outputs: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stage {
    pub(crate) name: String,
    pub(crate) workers: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Edge {
    pub(crate) from: Option<usize>,
    pub(crate) to: Option<usize>,
    pub(crate) kind: String,
    pub(crate) record: Type,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Operator {
    pub(crate) uid: String,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) stage: usize,
    /// It has positions, state, or an end of an exchange.
    pub(crate) is_bound: bool,
    /// What its state depends on besides types: a window's size.
    pub(crate) detail: String,
    pub(crate) state: Option<State>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) by_key: bool,
    pub(crate) key: Type,
    pub(crate) value: Type,
    /// What a process operator declares: kind and name of each state, and its types.
    pub(crate) declared: Vec<(String, Type)>,
    /// What its values may have been before, by migration: by name where it declares them.
    #[serde(default)]
    pub(crate) migrates: Vec<(String, Type)>,
}

/// What a process operator declares.
#[derive(Debug, Clone, Default)]
pub(crate) struct Declared {
    /// Each state by its name, and what it keeps.
    pub(crate) states: Vec<(String, Type)>,
    /// What it may have kept before.
    pub(crate) migrates: Vec<(String, Type)>,
}

impl Described {
    /// Describes a plan; `declared` gives the states of operators that declare them by name.
    pub(crate) fn of(plan: &Plan, declared: impl Fn(usize) -> Declared) -> Self {
        let stage = |stage: &super::Stage| Stage {
            name: stage.name.clone(),
            workers: stage.workers.clone(),
        };
        let edge = |edge: &super::EdgeSpec| Edge {
            from: edge.from,
            to: edge.to,
            kind: edge.kind.label().into(),
            record: Type { name: edge.record.clone(), schema: edge.schema },
        };
        let operators = plan.operators.iter().enumerate();
        Self {
            layouts: (LAYOUT_VERSION, testudo_state::group::LAYOUT_VERSION),
            version: env!("CARGO_PKG_VERSION").into(),
            workers: plan.workers,
            key_groups: plan.key_groups,
            arena_bytes: plan.layout.arena_bytes,
            hash: plan.hash,
            stages: plan.stages.iter().map(stage).collect(),
            edges: plan.edges.iter().map(edge).collect(),
            operators: operators.map(|(at, spec)| operator(spec, declared(at))).collect(),
            counters: plan.user_counters.clone(),
            outputs: plan.outputs.iter().map(|(out, _)| out.path.display().to_string()).collect(),
        }
    }

    /// Whether a program that plans `new` may take over a job that this one describes: what changes
    /// then, or what is in the way and what to do.
    pub(crate) fn allows(&self, new: &Self) -> Result<Vec<Change>, String> {
        if self.layouts != new.layouts {
            return Err(format!(
                "the new program was built with another version of Testudo: its memory has layouts \
                 {:?}, the job's {:?}; {RESUME}",
                new.layouts, self.layouts
            ));
        }
        if (self.workers, self.key_groups) != (new.workers, new.key_groups) {
            return Err(format!(
                "the job has {} workers and {} key groups, the new program wants {} and {}; {RESUME}",
                self.workers, self.key_groups, new.workers, new.key_groups
            ));
        }
        self.same_stages(new)?;
        let mut changes = Vec::new();
        self.same_operators(new, &mut changes)?;
        self.same_edges(new)?;
        if self.counters != new.counters {
            return Err(format!(
                "the job's own counters are {:?}, the new program's {:?}; keep them, in their order, \
                 or {RESUME}",
                self.counters, new.counters
            ));
        }
        if self.outputs != new.outputs {
            return Err(format!(
                "the job writes {:?}, the new program would write {:?}; {RESUME}",
                self.outputs, new.outputs
            ));
        }
        // What was compared so far has names; this has not, and must be equal all the same.
        if (self.arena_bytes, self.hash) != (new.arena_bytes, new.hash) {
            return Err(format!("the new program lays memory out differently; {RESUME}"));
        }
        Ok(changes)
    }

    fn same_stages(&self, new: &Self) -> Result<(), String> {
        if self.stages.len() != new.stages.len() {
            let names =
                |of: &Self| of.stages.iter().map(|s| s.name.clone()).collect::<Vec<_>>().join(", ");
            return Err(format!(
                "the job has {} stages ({}), the new program {} ({}); {RESUME}",
                self.stages.len(),
                names(self),
                new.stages.len(),
                names(new)
            ));
        }
        for (old, new) in self.stages.iter().zip(&new.stages) {
            if old.workers != new.workers {
                return Err(format!(
                    "stage {} runs in workers {:?}, in the new program in {:?}; {RESUME}",
                    old.name, old.workers, new.workers
                ));
            }
        }
        Ok(())
    }

    fn same_edges(&self, new: &Self) -> Result<(), String> {
        if self.edges.len() != new.edges.len() {
            let (old, new) = (self.edges.len(), new.edges.len());
            return Err(format!("the job has {old} exchanges, the new program {new}; {RESUME}"));
        }
        for (old, new) in self.edges.iter().zip(&new.edges) {
            let place = self.edge_name(old);
            if (old.from, old.to, &old.kind) != (new.from, new.to, &new.kind) {
                return Err(format!(
                    "the {} exchange {place} is a {} exchange elsewhere in the new program; {RESUME}",
                    old.kind, new.kind
                ));
            }
            if old.record.schema != new.record.schema {
                return Err(format!(
                    "records {place} change their layout: {} (schema {:016x}) becomes {} ({:016x}), \
                     and some of the old ones are on their way; {RESUME}",
                    old.record.name, old.record.schema, new.record.name, new.record.schema
                ));
            }
        }
        Ok(())
    }

    fn edge_name(&self, edge: &Edge) -> String {
        let name = |end: Option<usize>, other: &str| {
            end.and_then(|stage| self.stages.get(stage))
                .map_or_else(|| other.to_owned(), |stage| stage.name.clone())
        };
        format!(
            "from {} to {}",
            name(edge.from, "standard input"),
            name(edge.to, "standard output")
        )
    }

    fn same_operators(&self, new: &Self, changes: &mut Vec<Change>) -> Result<(), String> {
        let find = |of: &Self, uid: &str| of.operators.iter().find(|o| o.uid == uid).cloned();
        let only = |of: &Self, other: &Self| {
            let only = of.operators.iter().filter(|o| find(other, &o.uid).is_none());
            only.cloned().collect::<Vec<_>>()
        };
        let (removed, added) = (only(self, new), only(new, self));
        let bound = |of: &[Operator]| {
            let bound = of.iter().filter(|operator| operator.is_bound);
            bound.map(|operator| operator.uid.clone()).collect::<Vec<_>>()
        };
        let (lost, gained) = (bound(&removed), bound(&added));
        if !lost.is_empty() || !gained.is_empty() {
            return Err(format!(
                "operators with state or positions are told by their uids: removed {lost:?}, added \
                 {gained:?}; give one that was only renamed its old uid with .uid(..), or {RESUME}"
            ));
        }
        let stage = |of: &Self, operator: &Operator| {
            of.stages.get(operator.stage).map_or_else(String::new, |stage| stage.name.clone())
        };
        let change = |operator: &Operator, what: &str, from: String, to: String| Change {
            operator: operator.uid.clone(),
            what: what.into(),
            from,
            to,
        };
        changes.extend(removed.iter().map(|o| change(o, "removed", stage(self, o), String::new())));
        changes.extend(added.iter().map(|o| change(o, "added", String::new(), stage(new, o))));
        for old in &self.operators {
            let Some(new) = find(new, &old.uid) else { continue };
            same_operator(old, &new, changes)?;
        }
        Ok(())
    }
}

/// What to do about a change that a running job cannot take.
const RESUME: &str = "take a savepoint, stop the job, and start the new program with --resume-from";

fn operator(spec: &OperatorSpec, declared: Declared) -> Operator {
    let own = spec.migrates.iter().map(|migrates| (String::new(), migrates.from.clone()));
    let migrates: Vec<_> = own.chain(declared.migrates).collect();
    let named = |(name, schema): (&str, u64)| Type { name: name.into(), schema };
    let state = spec.state.map(|state| State {
        by_key: state.grouping == Grouping::ByKey,
        key: named(state.key),
        value: named(state.value),
        declared: declared.states,
        migrates: migrates.clone(),
    });
    Operator {
        uid: spec.uid().into(),
        name: spec.name.clone(),
        kind: spec.kind.into(),
        stage: spec.stage,
        is_bound: spec.is_bound(),
        detail: spec.detail.clone(),
        state,
    }
}

fn same_operator(old: &Operator, new: &Operator, changes: &mut Vec<Change>) -> Result<(), String> {
    let uid = &old.uid;
    let is_free = !old.is_bound && !new.is_bound;
    if (old.stage, &old.kind) != (new.stage, &new.kind) && !is_free {
        return Err(format!(
            "operator {uid} is a {} in stage {}, in the new program a {} in stage {}; {RESUME}",
            old.kind, old.stage, new.kind, new.stage
        ));
    }
    if old.detail != new.detail {
        return Err(format!(
            "operator {uid}: {} becomes {}, and its state is cut by the old one; {RESUME}, with \
             another uid for it",
            old.detail, new.detail
        ));
    }
    if old.name != new.name {
        changes.push(Change {
            operator: uid.clone(),
            what: "name".into(),
            from: old.name.clone(),
            to: new.name.clone(),
        });
    }
    let (Some(was), Some(is)) = (&old.state, &new.state) else {
        return if old.state == new.state {
            Ok(())
        } else {
            Err(format!("operator {uid} keeps state in one of the programs alone; {RESUME}"))
        };
    };
    if was.by_key != is.by_key || was.key.schema != is.key.schema {
        return Err(format!(
            "operator {uid} has keys {} (schema {:016x}), in the new program {} ({:016x}): its state \
             cannot be found by them; {RESUME}, with another uid for it",
            was.key.name, was.key.schema, is.key.name, is.key.schema
        ));
    }
    same_values(uid, was, is, changes)
}

/// Values have the same layout, or are migrated; and process operators declare the same states, if
/// perhaps more.
fn same_values(
    uid: &str,
    was: &State,
    is: &State,
    changes: &mut Vec<Change>,
) -> Result<(), String> {
    let is_migrated = |state: &str, old: &Type| {
        let mut from = is.migrates.iter().filter(|(of, _)| of == state);
        from.any(|(_, from)| from.schema == old.schema)
    };
    let mut migrated = |what: String, old: &Type, new: &Type| {
        changes.push(Change {
            operator: uid.to_owned(),
            what: format!("{what}{MIGRATED}"),
            from: old.name.clone(),
            to: new.name.clone(),
        });
    };
    if was.value.schema != is.value.schema {
        if !is_migrated("", &was.value) {
            return Err(format!(
                "operator {uid} keeps values {} (schema {:016x}), in the new program {} ({:016x}); \
                 keep the type, say how it is migrated (.migrate_from), or give the operator \
                 another uid and {RESUME}",
                was.value.name, was.value.schema, is.value.name, is.value.schema
            ));
        }
        migrated("values".into(), &was.value, &is.value);
    }
    for (name, old) in &was.declared {
        let is = is.declared.iter().find(|(known, _)| known == name);
        let Some((_, new)) = is.filter(|(_, new)| new.schema != old.schema) else { continue };
        if !is_migrated(name, old) {
            return Err(format!(
                "operator {uid}: state {name} is a {}, in the new program a {}; keep the type, say \
                 how it is migrated (.migrate_from), or declare the new one under another name",
                old.name, new.name
            ));
        }
        migrated(format!("state {name}"), old, new);
    }
    Ok(())
}

/// How what is migrated is told among changes.
const MIGRATED: &str = ", by migration,";

/// Whether any of these changes is a migration.
pub(crate) fn migrates(changes: &[Change]) -> bool {
    changes.iter().any(|change| change.what.ends_with(MIGRATED))
}
