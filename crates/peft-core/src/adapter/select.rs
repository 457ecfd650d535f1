//! Which modules a method adapts, and which are trained whole: the settings that PEFT's tuners share.

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

use super::{
    config::{self, Keys},
    layout::ParameterLayout,
    method::{Role, Start, Tensor},
    targets::{Matched, TargetModules, full_match, unusable},
};
use crate::{
    error::{Error, Result},
    model::{ModelConfig, Module, ModuleKind, Place},
};

/// Which modules are adapted, and which are trained whole, under PEFT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// Which modules are adapted.
    pub target_modules: TargetModules,
    /// Which are not, although [`Self::target_modules`] names them.
    pub exclude_modules: Option<TargetModules>,
    /// Only the modules of these layers; PEFT takes it with a list of targets alone.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What the list of layers is called, where it is not the usual.
    pub layers_pattern: Vec<String>,
    /// Modules that are trained whole, by the end of their names. They are not adapted.
    pub modules_to_save: Vec<String>,
}

impl Selection {
    /// Of `targets`, without more.
    pub fn of(targets: TargetModules) -> Self {
        Self {
            target_modules: targets,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
        }
    }

    /// Reads the keys; `targets` are those that PEFT takes where none are given.
    ///
    /// # Errors
    /// A value of another form.
    pub fn read(keys: &Keys<'_>, targets: TargetModules) -> Result<Self> {
        let layers = keys.get("layers_to_transform", "a layer or a list of layers", |value| match value {
            Value::Array(list) => {
                list.iter().map(|layer| layer.as_u64().map(|layer| layer as usize)).collect()
            }
            other => other.as_u64().map(|layer| vec![layer as usize]),
        })?;
        let pattern = keys.get("layers_pattern", "a text or a list of texts", |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            other => config::texts(other),
        })?;
        Ok(Self {
            target_modules: keys.modules("target_modules")?.unwrap_or(targets),
            exclude_modules: keys.modules("exclude_modules")?,
            layers_to_transform: layers.filter(|layers: &Vec<usize>| !layers.is_empty()),
            layers_pattern: pattern.unwrap_or_default(),
            modules_to_save: keys.texts("modules_to_save")?.unwrap_or_default(),
        })
    }

    /// The keys as PEFT writes them for a layout.
    pub fn write(&self, layout: &ParameterLayout, map: &mut Map<String, Value>) {
        let list = |names: &[String]| if names.is_empty() { Value::Null } else { json!(names) };
        let exclude = match &self.exclude_modules {
            None => Value::Null,
            Some(TargetModules::Pattern(pattern)) => json!(pattern),
            Some(TargetModules::Names(names)) => list(names),
        };
        for (key, value) in [
            ("target_modules", config::adapted_modules(layout)),
            ("exclude_modules", exclude),
            // The adapted modules are written by their full names: which layers they are in is said by that.
            ("layers_to_transform", Value::Null),
            ("layers_pattern", Value::Null),
            ("modules_to_save", list(&self.modules_to_save)),
        ] {
            map.insert(key.to_owned(), value);
        }
    }

    /// Refuses what PEFT refuses.
    ///
    /// # Errors
    /// [`Error::AdapterSetting`].
    pub fn check(&self) -> Result<()> {
        let wrong = |key: &str, problem: &str| {
            Err(Error::AdapterSetting { file: None, key: key.to_owned(), problem: problem.to_owned() })
        };
        if self.layers_to_transform.is_some() && matches!(self.target_modules, TargetModules::Pattern(_)) {
            return wrong("layers_to_transform", "needs a list of names in `target_modules`, not a pattern");
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return wrong("layers_pattern", "needs `layers_to_transform`");
        }
        Ok(())
    }

    /// The adapted modules among those of `kinds`.
    ///
    /// # Errors
    /// Nothing is left, something matches that cannot be adapted, or a pattern is none.
    pub fn find(&self, model: &ModelConfig, kinds: &[ModuleKind]) -> Result<Matched> {
        self.check()?;
        let excluded = match &self.exclude_modules {
            None => Vec::new(),
            Some(excluded) => excluded.matching(&model.modules())?,
        };
        let left = |module: &Module| {
            !excluded.contains(&module.path) && !self.is_saved(module) && self.is_in_layers(module)
        };
        let mut matched = self.target_modules.find_where(model, kinds, &left)?;
        matched.unused.extend(self.unused_exclusions(model));
        Ok(matched)
    }

    /// Names in `exclude_modules` that match nothing.
    fn unused_exclusions(&self, model: &ModelConfig) -> Vec<String> {
        let Some(TargetModules::Names(names)) = &self.exclude_modules else { return Vec::new() };
        let modules = model.modules();
        let unused = |name: &&String| !modules.iter().any(|module| module.is_named(name));
        names.iter().filter(unused).cloned().collect()
    }

    fn is_saved(&self, module: &Module) -> bool {
        self.modules_to_save.iter().any(|name| module.is_named(name))
    }

    fn is_in_layers(&self, module: &Module) -> bool {
        let Some(layers) = &self.layers_to_transform else { return true };
        let exact = match &self.target_modules {
            TargetModules::Names(names) => names.contains(&module.path),
            TargetModules::Pattern(_) => false,
        };
        let named = self.layers_pattern.is_empty() || self.layers_pattern.iter().any(|name| name == "layers");
        let inside = matches!(module.place, Place::Layer(layer) if layers.contains(&layer));
        exact || (named && inside)
    }

    /// The modules that are trained whole, with their tensors.
    ///
    /// # Errors
    /// A name matches nothing, or something without weights.
    pub fn saved(&self, model: &ModelConfig) -> Result<Vec<(Module, Vec<Tensor>)>> {
        let modules = model.modules();
        let mut saved = Vec::new();
        for name in &self.modules_to_save {
            let mut matches = modules.iter().filter(|module| module.is_named(name)).peekable();
            if matches.peek().is_none() {
                let available =
                    modules.iter().filter(|module| has_weight(module)).map(|m| m.name().to_owned());
                let mut available: Vec<String> = available.collect();
                available.sort();
                available.dedup();
                return Err(Error::NoModuleToSave { name: name.clone(), available });
            }
            for module in matches {
                if let ModuleKind::Other(what) = module.kind {
                    let (pattern, module) = (name.clone(), module.path.clone());
                    return Err(Error::WrongTarget { pattern, module, what });
                }
                if !saved.iter().any(|(saved, _)| saved == module) {
                    saved.push((module.clone(), whole(module)));
                }
            }
        }
        Ok(saved)
    }
}

fn has_weight(module: &Module) -> bool {
    !matches!(module.kind, ModuleKind::Other(_))
}

/// All tensors of a module, trained in place.
fn whole(module: &Module) -> Vec<Tensor> {
    let shape = match module.kind {
        ModuleKind::Norm => vec![module.shape[1]],
        _ => module.shape.to_vec(),
    };
    let mut tensors = vec![Tensor::new("weight", shape).start(Start::Base).role(Role::Weight)];
    if module.bias {
        tensors.push(Tensor::new("bias", [module.shape[0]]).start(Start::Base).role(Role::Bias));
    }
    tensors
}

/// A map from patterns of module names to values: `rank_pattern`, `alpha_pattern`. The first that matches counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Pattern<T>(pub Vec<(String, T)>);

impl<T> Default for Pattern<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Pattern<T> {
    /// The value for a module: that of the first key that matches `(.*\.)?(key)$`, as PEFT has it.
    ///
    /// # Errors
    /// A key is no regular expression.
    pub fn of(&self, module: &str) -> Result<Option<T>> {
        for (key, value) in &self.0 {
            let pattern = format!(r"(?:.*\.)?(?:{key})");
            if full_match(&pattern)?.is_match(module).map_err(|error| unusable(key, &error))? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// Checks every key.
    ///
    /// # Errors
    /// A key is no regular expression.
    pub fn check(&self) -> Result<()> {
        self.0
            .iter()
            .try_for_each(|(key, _)| Regex::new(key).map(|_| ()).map_err(|error| unusable(key, &error)))
    }

    /// Reads a key.
    ///
    /// # Errors
    /// It is no map, or a value is of another form.
    pub fn read(
        keys: &Keys<'_>,
        key: &str,
        wanted: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Self> {
        let map = keys.get(key, wanted, |value| {
            let map = value.as_object()?;
            map.iter().map(|(key, value)| Some((key.clone(), convert(value)?))).collect::<Option<Vec<_>>>()
        })?;
        Ok(Self(map.unwrap_or_default()))
    }
}
