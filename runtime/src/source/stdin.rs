//! Standard input, line by line. Lines enter through the launching process, so a crash of a worker
//! loses none.
//!
//! Called through [`Flow::stdin`](crate::flow::Flow::stdin).

use crate::flow::Flow;
use crate::flow::chain::InletChain;
use crate::flow::stream::{CountLink, Next, inlet_stream};
use crate::plan::{CounterKind, EdgeKind};

impl Flow {
    /// The lines of standard input, without their ends; bytes that are no UTF-8 are replaced.
    /// Parallelism 1.
    pub fn stdin(&self) -> Next<String, InletChain<String>, CountLink> {
        let edge = self.add_edge::<String>(None, None, EdgeKind::Stdin);
        let stream = inlet_stream::<String>(self, vec![edge], "lines").parallelism(1);
        stream.counted("stdin", "source", CounterKind::Out)
    }
}
