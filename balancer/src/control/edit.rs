//! Changes of the configuration's text, comments and all: what comes out is a text like a user's, and checked as one.

use serde::Deserialize;
use serde_json::{Map, Value as Json};
use toml_edit::{Array, DocumentMut, InlineTable, Item, Table, TableLike, Value};

/// A change.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub enum Edit {
    /// One more `[[server]]`, with these keys.
    Add {
        /// Its name.
        name: String,
        /// Its other keys.
        keys: Map<String, Json>,
    },
    /// A server's keys, merged as RFC 7396 says: `null` removes one, an object changes those it names.
    Set {
        /// Its name.
        name: String,
        /// The keys.
        keys: Map<String, Json>,
    },
    /// Without this server.
    Remove {
        /// Its name.
        name: String,
    },
    /// A service with another policy.
    Policy {
        /// The service.
        service: String,
        /// The policy.
        policy: String,
    },
}

/// Makes a change to a text.
///
/// # Errors
/// A sentence: the text is no TOML, there is no such server, or a value has no equal in TOML.
pub fn apply(text: &str, edit: &Edit) -> Result<String, String> {
    let mut document: DocumentMut =
        text.parse().map_err(|error: toml_edit::TomlError| error.message().to_owned())?;
    match edit {
        Edit::Add { name, keys } => add(&mut document, name, keys)?,
        Edit::Set { name, keys } => {
            if keys.get("name").is_some_and(|other| other != name.as_str()) {
                return Err("a server keeps its name: add one and remove the other".to_owned());
            }
            merge(named(&mut document, "server", name)?, keys)?;
        }
        Edit::Remove { name } => remove(&mut document, name)?,
        Edit::Policy { service, policy } => {
            let table = named(&mut document, "service", service)?;
            put(table, "policy", policy.as_str().into());
        }
    }
    Ok(document.to_string())
}

fn is_named(table: &dyn TableLike, name: &str) -> bool {
    table.get("name").and_then(Item::as_str) == Some(name)
}

/// The table of a list (`[[server]]` or `server = [{...}]`) with a name.
fn named<'a>(document: &'a mut DocumentMut, list: &str, name: &str) -> Result<&'a mut dyn TableLike, String> {
    let missing = || format!("there is no {list} named {name:?}");
    match document.get_mut(list) {
        Some(Item::ArrayOfTables(tables)) => {
            let found = tables.iter_mut().find(|table| is_named(*table, name));
            found.map(|table| table as &mut dyn TableLike).ok_or_else(missing)
        }
        Some(Item::Value(Value::Array(array))) => {
            let mut tables = array.iter_mut().filter_map(Value::as_inline_table_mut);
            let found = tables.find(|table| is_named(*table, name));
            found.map(|table| table as &mut dyn TableLike).ok_or_else(missing)
        }
        _ => Err(missing()),
    }
}

fn add(document: &mut DocumentMut, name: &str, keys: &Map<String, Json>) -> Result<(), String> {
    let mut all = Map::new();
    all.insert("name".to_owned(), name.into());
    all.extend(
        keys.iter().filter(|(key, _)| *key != "name").map(|(key, value)| (key.clone(), value.clone())),
    );
    match document.entry("server").or_insert_with(|| Item::ArrayOfTables(toml_edit::ArrayOfTables::new())) {
        Item::ArrayOfTables(tables) => {
            let mut table = Table::new();
            merge(&mut table, &all)?;
            tables.push(table);
            Ok(())
        }
        Item::Value(Value::Array(array)) => {
            let mut table = InlineTable::new();
            merge(&mut table, &all)?;
            array.push(table);
            Ok(())
        }
        _ => Err("`server` is no list".to_owned()),
    }
}

fn remove(document: &mut DocumentMut, name: &str) -> Result<(), String> {
    let missing = || format!("there is no server named {name:?}");
    match document.get_mut("server") {
        Some(Item::ArrayOfTables(tables)) => {
            let at = tables.iter().position(|table| is_named(table, name)).ok_or_else(missing)?;
            tables.remove(at);
        }
        Some(Item::Value(Value::Array(array))) => {
            let is = |value: &Value| value.as_inline_table().is_some_and(|table| is_named(table, name));
            let at = array.iter().position(is).ok_or_else(missing)?;
            array.remove(at);
        }
        _ => return Err(missing()),
    }
    Ok(())
}

fn merge(table: &mut dyn TableLike, patch: &Map<String, Json>) -> Result<(), String> {
    for (key, value) in patch {
        match value {
            Json::Null => {
                table.remove(key);
            }
            Json::Object(inner) => {
                let item = table.entry(key).or_insert_with(|| Item::Value(InlineTable::new().into()));
                if !item.is_table_like() {
                    *item = Item::Value(InlineTable::new().into());
                }
                if let Some(sub) = item.as_table_like_mut() {
                    merge(sub, inner)?;
                }
            }
            other => put(table, key, value_of(other)?),
        }
    }
    Ok(())
}

/// Sets a key; the comment behind an old value stays.
fn put(table: &mut dyn TableLike, key: &str, mut value: Value) {
    match table.get_mut(key) {
        Some(Item::Value(old)) => {
            *value.decor_mut() = old.decor().clone();
            *old = value;
        }
        Some(other) => *other = Item::Value(value),
        None => {
            table.insert(key, Item::Value(value));
        }
    }
}

fn value_of(json: &Json) -> Result<Value, String> {
    Ok(match json {
        Json::Null => return Err("TOML has no null".to_owned()),
        Json::Bool(value) => (*value).into(),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => integer.into(),
            (None, Some(float)) if number.is_f64() => float.into(),
            _ => return Err(format!("{number} is too large")),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(list) => Value::Array(list.iter().map(value_of).collect::<Result<Array, _>>()?),
        Json::Object(map) => {
            let mut table = InlineTable::new();
            merge(&mut table, map)?;
            table.into()
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TEXT: &str = r#"# Ours.
role = "balancer"
vips = ["203.0.113.10"]

[[service]]
name = "web"
redirect_port = 443
policy = "random" # for now

# The old one.
[[server]]
name = "web-1"
address = "10.0.0.11"
weight = 3 # it is large
ports = { web = 41001 }

[[server]]
name = "web-2"
address = "10.0.0.12"
[server.ports]
web = 41002

[host]
exid = 0x1234
"#;

    fn keys(json: Json) -> Map<String, Json> {
        let Json::Object(map) = json else { panic!("{json}") };
        map
    }

    fn changed(edit: &Edit) -> String {
        apply(TEXT, edit).unwrap()
    }

    fn set(name: &str, json: Json) -> Edit {
        Edit::Set { name: name.to_owned(), keys: keys(json) }
    }

    #[test]
    fn only_what_is_changed_changes_and_comments_stay() {
        assert_eq!(
            changed(&set("web-1", json!({ "weight": 5 }))),
            TEXT.replace("weight = 3 # it", "weight = 5 # it")
        );
        let policy = Edit::Policy { service: "web".to_owned(), policy: "source".to_owned() };
        assert_eq!(changed(&policy), TEXT.replace("\"random\"", "\"source\""));
        let drained = changed(&set("web-1", json!({ "state": "drain" })));
        assert_eq!(drained, TEXT.replace("web = 41001 }\n", "web = 41001 }\nstate = \"drain\"\n"));
        // Twice is the same as once.
        assert_eq!(apply(&drained, &set("web-1", json!({ "state": "drain" }))).unwrap(), drained);
    }

    #[test]
    fn objects_are_merged_and_null_removes() {
        let text = changed(&set("web-1", json!({ "ports": { "mail": 41005 }, "weight": null })));
        assert!(
            text.contains("ports = { web = 41001 , mail = 41005 }")
                || text.contains("ports = { web = 41001, mail = 41005 }"),
            "{text}"
        );
        assert!(!text.contains("weight"), "{text}");
        let text = changed(&set("web-2", json!({ "ports": { "web": 41009, "mail": 41005 } })));
        assert!(text.contains("[server.ports]\nweb = 41009\nmail = 41005\n"), "{text}");
        let text = changed(&set("web-2", json!({ "address": ["10.0.0.12", "fd00::12"], "state": "down" })));
        assert!(
            text.contains("address = [\"10.0.0.12\", \"fd00::12\"]\nstate = \"down\"\n[server.ports]"),
            "{text}"
        );
    }

    #[test]
    fn a_server_is_added_behind_the_others_and_removed_again() {
        let add = Edit::Add {
            name: "web-3".to_owned(),
            keys: keys(json!({ "address": "10.0.0.13", "ports": { "web": 41003 }, "weight": 2 })),
        };
        let more = changed(&add);
        let at = |what: &str| more.find(what).unwrap_or_else(|| panic!("no {what}: {more}"));
        assert!(at("web-2") < at("web-3") && at("web-3") < at("[host]"), "{more}");
        let server = toml::from_str::<toml::Table>(&more).unwrap()["server"][2].clone();
        let wanted: toml::Table =
            toml::from_str("name = \"web-3\"\naddress = \"10.0.0.13\"\nports.web = 41003\nweight = 2")
                .unwrap();
        assert_eq!(server.as_table(), Some(&wanted));
        assert_eq!(apply(&more, &Edit::Remove { name: "web-3".to_owned() }).unwrap(), TEXT);
        let less = changed(&Edit::Remove { name: "web-1".to_owned() });
        assert!(!less.contains("web-1") && less.contains("web-2") && less.contains("# for now"), "{less}");
    }

    #[test]
    fn inline_lists_are_changed_as_well_and_a_first_server_is_added() {
        let text = "vips = []\nserver = [{ name = \"a\", weight = 1 }]\n";
        let more = apply(text, &Edit::Add { name: "b".to_owned(), keys: Map::new() }).unwrap();
        assert_eq!(more, "vips = []\nserver = [{ name = \"a\", weight = 1 }, { name = \"b\" }]\n");
        let less = apply(&more, &Edit::Remove { name: "a".to_owned() }).unwrap();
        assert_eq!(toml::from_str::<toml::Table>(&less).unwrap()["server"].as_array().map(Vec::len), Some(1));
        let heavier = apply(&more, &set("a", json!({ "weight": 2 }))).unwrap();
        assert!(heavier.contains("weight = 2"), "{heavier}");
        let first =
            apply("vips = []\n[host]\n", &Edit::Add { name: "b".to_owned(), keys: Map::new() }).unwrap();
        assert!(first.contains("[[server]]\nname = \"b\"\n"), "{first}");
    }

    #[test]
    fn what_cannot_be_changed_is_told() {
        for (text, edit, told) in [
            (TEXT, set("web-9", json!({})), "there is no server named \"web-9\""),
            (TEXT, Edit::Remove { name: "web-9".to_owned() }, "there is no server named \"web-9\""),
            (
                TEXT,
                Edit::Policy { service: "mail".to_owned(), policy: "source".to_owned() },
                "there is no service named \"mail\"",
            ),
            (TEXT, set("web-1", json!({ "name": "web-2" })), "keeps its name"),
            (TEXT, set("web-1", json!({ "weight": [null] })), "no null"),
            (TEXT, set("web-1", json!({ "weight": u64::MAX })), "too large"),
            ("server = 3\n", Edit::Add { name: "b".to_owned(), keys: Map::new() }, "no list"),
            ("server = \n", Edit::Remove { name: "b".to_owned() }, ""),
        ] {
            let error = apply(text, &edit).unwrap_err();
            assert!(error.contains(told), "{edit:?}: {error}");
        }
    }
}
