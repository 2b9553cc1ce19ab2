// The HTTP API for people: everything that the OpenAPI document says, and a request to copy for each route.
import { Client } from "./api.js";
import { quote } from "./lines.js";
import { askToken } from "./token.js";

const $ = (id) => document.getElementById(id);
const client = new Client(askToken);

/** An element with attributes and children; `null` children are left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Text in which `code` is marked as in Markdown. */
const prose = (text) => text.split("`").map((part, index) => (index % 2 ? make("code", {}, part) : part));

const nameOf = (reference) => reference.split("/").at(-1);

/** A schema in words, with a link to each that has a name. */
function typeOf(schema) {
  if (schema.$ref) return [make("a", { href: `#${nameOf(schema.$ref)}` }, nameOf(schema.$ref))];
  if (schema.anyOf ?? schema.oneOf) return (schema.anyOf ?? schema.oneOf).flatMap((part, index) => [...(index ? [" or "] : []), ...typeOf(part)]);
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(", ")];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items ?? {})];
  if (schema.type === "object" && schema.additionalProperties?.type) return ["object of ", ...typeOf(schema.additionalProperties)];
  if (schema.contentMediaType || schema.format === "binary") return ["file"];
  const limits = [schema.minimum, schema.maximum].filter((limit) => limit !== undefined);
  return [(schema.type ?? "anything") + (limits.length === 2 ? ` in [${limits.join(", ")}]` : "")];
}

/** A table of fields: [{name, schema, description, required}]. */
function tableOf(caption, fields) {
  if (!fields.length) return null;
  const rows = fields.map(({ name, schema, description, required }) => {
    const usual = schema.default === undefined ? (required ? "required" : "") : JSON.stringify(schema.default);
    return make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, ...typeOf(schema)), make("td", {}, usual), make("td", { class: "says" }, ...prose(description ?? schema.description ?? "")));
  });
  const heads = ["Name", "Type", "Default", "What it is"].map((head) => make("th", { scope: "col" }, head));
  const table = make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
}

function fieldsOf({ properties = {}, required = [] }) {
  const fields = Object.entries(properties).map(([name, schema]) => ({ name, schema, required: required.includes(name) }));
  return fields.sort((first, second) => second.required - first.required);
}

/** A value that a field may have, for the request to copy. */
function exampleOf(schema, schemas) {
  if (schema.$ref) return Object.fromEntries(fieldsOf(schemas[nameOf(schema.$ref)]).filter(({ required }) => required).map(({ name, schema: own }) => [name, exampleOf(own, schemas)]));
  if (schema.examples) return schema.examples[0];
  if (schema.anyOf ?? schema.oneOf) return exampleOf((schema.anyOf ?? schema.oneOf)[0], schemas);
  if (schema.type === "array") return [exampleOf(schema.items ?? {}, schemas)];
  return { string: "…", object: {}, integer: 1, number: 0.5, boolean: true }[schema.type] ?? null;
}

/** The request as a line of a shell, long texts shortened. */
function curlOf(method, path, body, schemas, token) {
  const place = path.slice(1).replace(/{(\w+)}/g, (_, name) => name.toUpperCase());
  const words = [new URL(place, document.baseURI).href];
  if (!["get", "post"].includes(method)) words.push("-X", method.toUpperCase());
  const [kind, { schema } = {}] = Object.entries(body?.content ?? {})[0] ?? [];
  if (kind === "application/json") words.push("-H", `Content-Type: ${kind}`, "-d", JSON.stringify(exampleOf(schema, schemas), (_, value) => (value?.length > 60 ? "…" : value)));
  else if (kind) {
    for (const { name, schema: own, required } of fieldsOf(schemas[nameOf(schema.$ref)])) {
      if (!required) continue;
      const value = exampleOf(own, schemas);
      for (const each of Array.isArray(value) ? value : [value]) words.push("-F", `${name}=${name.startsWith("file") ? "@image.png" : each}`);
    }
  }
  return ["curl", ...(token ? ['-H "Authorization: Bearer $OPEN_GEM_TOKEN"'] : []), ...words.map(quote)].join(" ");
}

function routeOf(method, path, operation, schemas) {
  const body = operation.requestBody;
  const schema = Object.values(body?.content ?? {})[0]?.schema;
  const [status, { content = {}, description }] = Object.entries(operation.responses).find(([code]) => code.startsWith("2"));
  const [kind, { schema: answer } = {}] = Object.entries(content)[0] ?? [];
  return make("details", { class: "route", id: operation.operationId },
    make("summary", {}, make("code", {}, `${method.toUpperCase()} ${path}`), make("span", { class: "quiet" }, ...prose(operation.description ?? operation.summary ?? ""))),
    tableOf(`Parameters of ${path}`, (operation.parameters ?? []).map(({ name, in: place, ...rest }) => ({ ...rest, name: `${name} (${place})` }))),
    schema?.$ref ? tableOf(`Fields of ${method.toUpperCase()} ${path}, ${Object.keys(body.content)[0]}`, fieldsOf(schemas[nameOf(schema.$ref)])) : null,
    make("p", {}, `${status}: `, ...(answer && kind === "application/json" ? typeOf(answer) : [kind ?? description])),
    make("pre", { tabindex: "0", role: "region", "aria-label": `${path} with curl` }, curlOf(method, path, body, schemas, client.token)));
}

function show({ info, paths, components: { schemas } }) {
  const routes = Object.entries(paths).flatMap(([path, own]) => Object.entries(own).map(([method, operation]) => ({ method, path, operation })));
  const groups = Map.groupBy?.(routes, ({ operation }) => operation.tags?.[0] ?? "other") ?? new Map([["routes", routes]]);
  const errors = Object.entries(routes[0].operation.responses).filter(([code]) => !code.startsWith("2"));
  $("model").textContent = `${info.title} ${info.version}`;
  $("docs").replaceChildren(
    make("section", {}, ...info.description.split("\n\n").map((text) => make("p", {}, ...prose(text)))),
    ...[...groups].map(([group, own]) => make("section", {}, make("h2", {}, group), ...own.map(({ method, path, operation }) => routeOf(method, path, operation, schemas)))),
    make("section", {}, make("h2", {}, "Errors of every route"), make("ul", {}, ...errors.map(([code, { description }]) => make("li", {}, `${code}: ${description}`)))),
    make("section", {}, make("h2", {}, "Values"), ...Object.entries(schemas).map(([name, schema]) => make("div", { id: name, class: "value" }, make("h3", {}, name), schema.description ? make("p", {}, ...prose(schema.description)) : null, tableOf(`Fields of ${name}`, fieldsOf(schema))))));
  $("docs").ariaBusy = "false";
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

try {
  show(await client.json("openapi.json"));
} catch (error) {
  $("trouble").hidden = false;
  $("trouble").querySelector("p").textContent = error.message;
}
