//! Classes of servers: which of a set's servers are chosen among, by the packet's payload (`payload`) or its DSCP.
//!
//! A pattern that matches comes first, then the DSCP's class, then all servers. Plain clients (`B3`) are not classed:
//! each of their packets is routed alone (`B6`), and programs change the DSCP in the middle of a connection.

use std::sync::Arc;

use shunt_stack::time::Instant;

use super::{Request, Select};
use crate::config::{Class, Fallback, Pattern};
use crate::table::ServerId;

/// Where classes come from, for all sets.
#[derive(Debug, Default)]
pub(crate) struct Classes {
    /// By DSCP: index of the class + 1, 0 for none.
    by_dscp: Box<[u8]>,
    fallback: Box<[Fallback]>,
}

impl Classes {
    pub(crate) fn new(classes: &[Class]) -> Classes {
        let mut by_dscp = vec![0; 64];
        for (index, class) in classes.iter().enumerate() {
            for &dscp in &class.dscp {
                by_dscp[usize::from(dscp)] = index as u8 + 1;
            }
        }
        let fallback = classes.iter().map(|class| class.fallback).collect();
        Classes { by_dscp: by_dscp.into(), fallback }
    }

    /// The class that a DSCP stands for.
    pub(crate) fn of_dscp(&self, dscp: u8) -> Option<usize> {
        let class = self.by_dscp.get(usize::from(dscp)).copied().unwrap_or_default();
        usize::from(class).checked_sub(1)
    }
}

/// How a set's servers are chosen among: one policy over all, one over each class.
#[derive(Debug)]
pub(crate) struct Choice {
    all: Box<dyn Select>,
    /// By class; `None` where no server of the class is up.
    by_class: Box<[Option<Box<dyn Select>>]>,
    classes: Arc<Classes>,
    patterns: Box<[Pattern]>,
}

impl Choice {
    pub(crate) fn new(
        all: Box<dyn Select>,
        by_class: Box<[Option<Box<dyn Select>>]>,
        classes: Arc<Classes>,
        patterns: &[Pattern],
    ) -> Choice {
        Choice { all, by_class, classes, patterns: patterns.into() }
    }

    fn class(&self, request: &Request<'_>) -> Option<usize> {
        let matching = self.patterns.iter().find(|pattern| pattern.matches(request.payload));
        matching.map(|pattern| pattern.class).or_else(|| self.classes.of_dscp(request.dscp))
    }

    /// The chosen server (`B1`); `None` if its class has none that is up and may not fall back on the others.
    pub(crate) fn select(&self, request: &Request<'_>) -> Option<ServerId> {
        let Some(class) = self.class(request) else { return Some(self.all.select(request)) };
        match (self.by_class.get(class).and_then(Option::as_ref), self.classes.fallback.get(class)) {
            (Some(own), _) => Some(own.select(request)),
            (None, Some(Fallback::Drop)) => None,
            (None, _) => Some(self.all.select(request)),
        }
    }

    /// Follows what has changed with time or by loads; says when to be called again at the latest, if ever.
    pub(crate) fn refresh(&self, now: Instant) -> Option<Instant> {
        let own = self.by_class.iter().flatten();
        std::iter::once(&self.all).chain(own).filter_map(|policy| policy.refresh(now)).min()
    }
}
