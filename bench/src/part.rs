//! The bench of the endpoint, and what this program runs inside the hosts: processes of their own, since each may only
//! open so many files.

use std::io::{BufRead as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use clap::Subcommand;

use crate::{echo, endpoint, hold};

/// Another bench, or a part that a bench starts.
#[derive(Debug, Clone, Subcommand)]
pub enum Part {
    Endpoint(endpoint::Arguments),
    /// The process with the endpoint
    #[command(hide = true)]
    EndpointInside(endpoint::Inside),
    /// The kernel's services for it
    #[command(hide = true)]
    EndpointKernel,
    /// Sends back what arrives on these ports
    #[command(hide = true)]
    Echo {
        /// TCP ports
        #[arg(required = true)]
        ports: Vec<u16>,
    },
    /// Opens connections that stay open, as many as standard input says
    #[command(hide = true)]
    Hold {
        /// Where to
        #[arg(long)]
        target: SocketAddr,
        /// Where from, in turn
        #[arg(long, required = true)]
        source: Vec<Ipv4Addr>,
    },
}

impl Part {
    /// Does it until the bench ends.
    ///
    /// # Errors
    /// A port cannot be listened on; a connection cannot be opened or does not live.
    pub fn run(&self) -> Result<()> {
        if let Part::Endpoint(arguments) = self {
            return endpoint::run(arguments);
        }
        shunt_lab::die_with_parent()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        match self {
            Part::Endpoint(_) => Ok(()),
            Part::EndpointInside(inside) => {
                let runtime = tokio::runtime::Runtime::new()?;
                // On a worker, as programs run beside the endpoint.
                runtime.block_on(runtime.spawn(inside.clone().run()))?
            }
            Part::EndpointKernel => endpoint::serve(),
            Part::Echo { ports } => runtime.block_on(echo::serve(ports)),
            Part::Hold { target, source } => {
                let mut open = Vec::new();
                for line in std::io::stdin().lock().lines() {
                    let count = line?.trim().parse()?;
                    let again = runtime.block_on(hold::open_until(&mut open, count, source, *target))?;
                    println!("{again}");
                    std::io::stdout().flush()?;
                }
                Ok(())
            }
        }
    }
}
