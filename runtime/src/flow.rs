//! The flow: what a job does, said in code. Building it makes the plan; nothing runs yet.
//!
//! The same function builds the same flow in the launching process and in every worker (its hash is
//! compared on attach), so no code is shipped. Operators between two exchanges fuse into one stage.
//!
//! `stream` has the operators on single records, `keyed` those on keyed state, `windowed` the
//! windows.

pub(crate) mod chain;

pub mod stream;

pub mod keyed;

pub mod windowed;

pub mod migrate;

use crate::config::Settings;
use crate::error::Error;
use crate::plan::{EdgeKind, EdgeSpec, OperatorSpec, Output, StageSpec};
use crate::source::{Source, Wishes};
use crate::worker::attach::Attach;
use chain::SourceChain;
use std::cell::RefCell;
use std::rc::Rc;
use stream::Stream;
use testudo_shm::record::Record;

/// Builds a stage in a worker; called once for each subtask that the worker runs.
pub(crate) type Factory = Box<dyn FnOnce(&mut Attach) -> Result<crate::worker::StageRef, Error>>;

/// Lists the states that an operator declares, each with its name and type.
pub(crate) type Lister = Box<dyn Fn() -> crate::plan::described::Declared>;

#[derive(Default)]
pub(crate) struct Draft {
    pub(crate) stages: Vec<StageSpec>,
    pub(crate) factories: Vec<Option<Factory>>,
    pub(crate) edges: Vec<EdgeSpec>,
    pub(crate) operators: Vec<OperatorSpec>,
    /// Each with the operator that writes it.
    pub(crate) outputs: Vec<(Output, usize)>,
    /// What the launching process needs of each sink.
    pub(crate) sinks: Vec<crate::sink::SinkHooks>,
    /// Sources that cannot be read again.
    pub(crate) read_once: Vec<(usize, String)>,
    /// What the job itself promises.
    pub(crate) wanted: crate::slo::Wanted,
    /// Files that sources read.
    pub(crate) inputs: Vec<std::path::PathBuf>,
    pub(crate) user_counters: Vec<String>,
    /// For process operators: the states that they declare.
    pub(crate) declared: Vec<(usize, Lister)>,
    /// How values of operators are migrated that were of other types.
    pub(crate) movers: Vec<(usize, crate::operator::migrate::Mover)>,
    /// Streams that are printed to files.
    pub(crate) prints: usize,
    /// What each source's survey found, in the order of the sources.
    pub(crate) surveys: Vec<String>,
    pub(crate) errors: Vec<String>,
}

/// A job's dataflow while it is being described.
///
/// ```no_run
/// use testudo::prelude::*;
///
/// fn build(flow: &Flow, _options: &NoOptions) {
///     flow.source("numbers", Generator::new(1_000_000, |n| n % 10))
///         .key_by(|n| *n)
///         .aggregate(|| 0u64, |count, _n| *count += 1, |digit, count| *digit * 1_000_000 + *count)
///         .for_each(|_| ());
/// }
///
/// fn main() -> std::process::ExitCode {
///     testudo::main(build)
/// }
/// ```
#[derive(Clone)]
pub struct Flow {
    pub(crate) draft: Rc<RefCell<Draft>>,
    pub(crate) settings: Rc<Settings>,
    /// In a worker: the surveys that the launching process made.
    surveys: Rc<Vec<String>>,
}

impl std::fmt::Debug for Flow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let draft = self.draft.borrow();
        write!(f, "Flow({} stages, {} operators)", draft.stages.len(), draft.operators.len())
    }
}

impl Flow {
    pub(crate) fn new(settings: Rc<Settings>) -> Self {
        Self { draft: Rc::default(), settings, surveys: Rc::default() }
    }

    /// As in a worker, which takes the surveys as they were made before.
    pub(crate) fn with_surveys(settings: Rc<Settings>, surveys: Vec<String>) -> Self {
        Self { draft: Rc::default(), settings, surveys: Rc::new(surveys) }
    }

    /// The survey of the source that is added next.
    fn next_survey(&self) -> Option<String> {
        self.surveys.get(self.draft.borrow().surveys.len()).cloned()
    }

    /// The number of worker processes that stages are spread over by default.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.settings.workers
    }

    /// Adds a source. Its parallelism is the number of workers unless changed.
    pub fn source<S: Source>(&self, name: &str, mut source: S) -> Stream<S::Out, SourceChain<S>> {
        let stage = self.add_stage(name);
        let operator = self.add_operator(stage, name, "source");
        let wishes = Wishes { limit: self.settings.limit, keep_whole: self.settings.no_split };
        let survey = match self.next_survey() {
            Some(survey) => Ok(survey),
            None => source.survey(&wishes),
        };
        let configured = survey.and_then(|survey| {
            let done = source.configure(&survey, &wishes);
            self.draft.borrow_mut().surveys.push(survey);
            done
        });
        let mut divide_limit = None;
        match configured {
            Ok(true) => {}
            Ok(false) => divide_limit = self.settings.limit,
            Err(message) => self.error(format!("source {name}: {message}")),
        }
        if !source.is_replayable() {
            self.draft.borrow_mut().read_once.push((operator, format!("source {name}")));
        }
        self.draft.borrow_mut().inputs.extend(source.inputs());
        let source = Rc::new(source);
        let rejects = source.may_reject().then(|| self.rejects_edge(stage, name)).flatten();
        let chain = SourceChain { source, operator, stage, rejects, divide_limit };
        Stream::new(self, stage, operator, chain)
    }

    /// A counter of the job's own: shown in the report, exact across crashes.
    pub fn counter(&self, name: &str) -> crate::metrics::Counter {
        let mut draft = self.draft.borrow_mut();
        draft.user_counters.push(name.into());
        crate::metrics::Counter::new(draft.user_counters.len() - 1)
    }

    pub(crate) fn add_stage(&self, name: &str) -> usize {
        let mut draft = self.draft.borrow_mut();
        draft.stages.push(StageSpec::new(name));
        draft.factories.push(None);
        draft.stages.len() - 1
    }

    pub(crate) fn add_operator(&self, stage: usize, name: &str, kind: &'static str) -> usize {
        let mut draft = self.draft.borrow_mut();
        draft.operators.push(OperatorSpec::new(stage, name, kind));
        draft.operators.len() - 1
    }

    pub(crate) fn add_edge<T: Record>(
        &self,
        from: Option<usize>,
        to: Option<usize>,
        kind: EdgeKind,
    ) -> usize {
        let mut draft = self.draft.borrow_mut();
        draft.edges.push(EdgeSpec {
            from,
            to,
            kind,
            record: short_name::<T>(),
            schema: T::schema(),
            record_bytes: T::SIZE,
        });
        draft.edges.len() - 1
    }

    pub(crate) fn set_factory(&self, stage: usize, factory: Factory) {
        self.draft.borrow_mut().factories[stage] = Some(factory);
    }

    pub(crate) fn error(&self, message: String) {
        self.draft.borrow_mut().errors.push(message);
    }

    /// The file that the next stream to be printed goes to, if the settings name one.
    pub(crate) fn next_print(&self) -> Option<std::path::PathBuf> {
        let mut path = self.settings.print_to.clone()?;
        let mut draft = self.draft.borrow_mut();
        draft.prints += 1;
        if draft.prints > 1 {
            path.as_mut_os_string().push(format!(".{}", draft.prints));
        }
        Some(path)
    }

    /// The stage that writes all sources' rejects, and an edge to it; `None` when no file was asked
    /// for.
    fn rejects_edge(&self, stage: usize, name: &str) -> Option<usize> {
        let path = self.settings.rejects.clone()?;
        let edge = self.add_edge::<String>(Some(stage), None, EdgeKind::Gather);
        let format = crate::sink::file::Lines(|line: &<String as Record>::View| line.to_string());
        let path = if self.draft.borrow().outputs.iter().any(|(output, _)| output.path == path) {
            path.with_extension(format!("{name}.rejects"))
        } else {
            path
        };
        let sink = crate::sink::file::FileSink::new(path, format);
        stream::inlet_stream::<String>(self, vec![edge], &format!("{name}-rejects"))
            .sink("rejects", sink);
        Some(edge)
    }
}

/// A type's name without its modules.
pub(crate) fn short_name<T>() -> String {
    let full = std::any::type_name::<T>();
    let mut short = String::new();
    let mut word = String::new();
    for c in full.chars() {
        if c.is_alphanumeric() || c == '_' {
            word.push(c);
        } else if c == ':' {
            word.clear();
        } else {
            short.push_str(&word);
            word.clear();
            short.push(c);
        }
    }
    short + &word
}
