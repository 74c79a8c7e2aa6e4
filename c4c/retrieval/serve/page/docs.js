// Shows openapi.json. FastAPI's own pages load their scripts from other servers; this one works offline.

import { $, make } from "./dom.js";

const named = (schema) => schema?.$ref?.split("/").at(-1) ?? schema?.title ?? schema?.type ?? "";

function kind(schema) {
  if (!schema) return "";
  if (schema.anyOf) return schema.anyOf.map(kind).filter((one) => one !== "null").join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  return schema.$ref ? named(schema) : schema.type ?? "";
}

function bounds(schema) {
  const one = schema?.anyOf?.find((part) => part.type !== "null") ?? schema ?? {};
  const words = [];
  if (one.minimum !== undefined) words.push(`from ${one.minimum}`);
  if (one.maximum !== undefined) words.push(`to ${one.maximum}`);
  if (schema?.default !== undefined && schema.default !== null) words.push(`default ${schema.default}`);
  return words.join(" ");
}

function table(head, rows) {
  return make("table", {}, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))))));
}

const code = (text) => make("code", {}, text);

/** Text in which `names` stand between backticks. */
const prose = (text) => make("span", {}, ...text.split("`").map((part, i) => (i % 2 ? code(part) : part)));

function route(path, method, about, schemas) {
  const words = make("details", { className: "route" }, make("summary", {}, make("span", { className: "method" }, method.toUpperCase()), " ", code(path), " ", prose(about.description ?? "")));
  const given = (about.parameters ?? []).toSorted((a, b) => b.required - a.required).map((one) => [code(one.name + (one.required ? "" : "?")), kind(one.schema), bounds(one.schema), prose(one.description ?? one.schema?.description ?? "")]);
  if (given.length) words.append(table(["parameter", "type", "bounds", ""], given));
  if (about.requestBody) words.append(make("p", {}, `Body: ${Object.keys(about.requestBody.content).join(", ")}`));
  for (const [status, answer] of Object.entries(about.responses ?? {})) {
    const schema = schemas[named(answer.content?.["application/json"]?.schema)];
    if (status !== "200" || !schema?.properties) continue;
    words.append(table([`answer ${status}`, "type", ""], Object.entries(schema.properties).map(([name, field]) => [code(name), kind(field), prose(field.description ?? "")])));
  }
  const others = Object.keys(about.responses ?? {}).filter((status) => status !== "200");
  if (others.length) words.append(make("p", { className: "quiet" }, `Other answers, with one sentence as detail: ${others.join(", ")}`));
  return words;
}

try {
  const answer = await fetch("openapi.json", { credentials: "same-origin" });
  if (!answer.ok) throw new Error(`the server answered with status ${answer.status}`);
  const { info, paths, components } = await answer.json();
  $("about").textContent = `${info.description} Version ${info.version}.`;
  const groups = new Map();
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, about] of Object.entries(methods)) {
      if (method === "head") continue;
      const group = about.tags?.[0] ?? "other";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(route(path, method, about, components?.schemas ?? {}));
    }
  }
  for (const [group, routes] of groups) $("routes").append(make("h2", {}, group), ...routes);
} catch (error) {
  $("about").textContent = `openapi.json cannot be shown: ${error.message}.`;
}
