//! The socket of the daemon that is meant.

use std::io::ErrorKind;

use shunt_host::Role;
use shunt_host::control::{Client, default_socket};

use super::{CtlArgs, RoleName};

/// Why there is nobody to ask.
pub(super) enum Error {
    /// More than one could be meant.
    Ambiguous(String),
    /// None is there, or lets itself be asked.
    Nobody(String),
}

/// Connects to the daemon that the arguments mean: by path, or the one of this network namespace.
pub(super) async fn connect(arguments: &CtlArgs) -> Result<Client, Error> {
    if let Some(path) = &arguments.socket {
        let told = |error| Error::Nobody(format!("no daemon serves {}: {error}", path.display()));
        return Client::connect(path).await.map_err(told);
    }
    let roles: Vec<Role> = match arguments.role {
        Some(RoleName::Balancer) => vec![Role::Balancer],
        Some(RoleName::Client) => vec![Role::Client],
        Some(RoleName::Server) => vec![Role::Server],
        None => Role::ALL.to_vec(),
    };
    let mut found = Vec::new();
    for &role in &roles {
        let path = default_socket(&arguments.state_dir, role)
            .map_err(|error| Error::Nobody(format!("cannot tell the network namespace: {error}")))?;
        match Client::connect(&path).await {
            Ok(client) => found.push((role, client)),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
            Err(error) => {
                let hint = if error.kind() == ErrorKind::PermissionDenied { " (be who runs it)" } else { "" };
                return Err(Error::Nobody(format!(
                    "cannot ask the {role} at {}: {error}{hint}",
                    path.display()
                )));
            }
        }
    }
    if found.len() > 1 {
        let names: Vec<&str> = found.iter().map(|(role, _)| role.name()).collect();
        let names = names.join(" and a ");
        return Err(Error::Ambiguous(format!("a {names} run here: say which by --role")));
    }
    found.pop().map(|(_, client)| client).ok_or_else(|| {
        let what = arguments.role.map_or("Shunt daemon".to_owned(), |_| roles[0].to_string());
        Error::Nobody(format!(
            "no {what} runs in this network namespace with its state in {} (run this where the daemon runs; --socket \
             and --state-dir as it was given)",
            arguments.state_dir.display()
        ))
    })
}
