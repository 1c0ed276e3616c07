/**
 * What `format` generates: a pattern per name, each within what its RFC allows; "" is any text. Beside JSON Schema's own
 * there are those that pydantic, zod and OpenAPI write.
 */
const OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
const DATE =
  "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])))";
const TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:0[0-9]|1[0-3]):[0-5][0-9])";
const LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,20}[A-Za-z0-9])?";
const HOST = `${LABEL}(?:\\.${LABEL}){0,4}`;

const IPV4 = `${OCTET}(?:\\.${OCTET}){3}`;
const IPV6 = "(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}";
const EMAIL = `[A-Za-z0-9_+-]{1,32}(?:\\.[A-Za-z0-9_+-]{1,32}){0,3}@${LABEL}(?:\\.${LABEL}){1,4}`;
/** Bounded, so that the usual limit of 2083 characters needs no counting. */
const PATH = "(?:/[A-Za-z0-9._~-]{0,60}){0,8}(?:\\?[A-Za-z0-9._~=&-]{0,120})?(?:#[A-Za-z0-9._~-]{0,40})?";
const URI = `https?://${HOST}(?::[1-9][0-9]{0,3})?${PATH}`;
const REFERENCE = `(?:${URI}|(?:/[A-Za-z0-9._~-]{1,40}){1,8})`;
const POINTER = "(?:/(?:[A-Za-z0-9_ .-]|~[01]){0,40}){0,10}";
const BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?";
/** RFC 9562: the version's digit, and a variant of 8 to b. */
const uuid = (version: string): string =>
  `[0-9a-f]{8}-[0-9a-f]{4}-${version}[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`;

export const FORMATS: Readonly<Record<string, string>> = {
  date: DATE,
  time: TIME,
  "date-time": `${DATE}T${TIME}`,
  duration: "P(?:[1-9][0-9]{0,3}W|[1-9][0-9]{0,3}D(?:T[1-9][0-9]{0,3}[HMS])?|T[1-9][0-9]{0,3}[HMS])",
  uuid: uuid("[1-8]"),
  ...Object.fromEntries(["1", "3", "4", "5", "6", "7", "8"].map((version) => [`uuid${version}`, uuid(version)])),
  ipv4: IPV4,
  ipv6: IPV6,
  ipvanyaddress: `${IPV4}|${IPV6}`,
  ipv4network: `${IPV4}/32`,
  ipv6network: `${IPV6}/128`,
  ipvanynetwork: `${IPV4}/32`,
  ipv4interface: `${IPV4}/(?:3[0-2]|[12]?[0-9])`,
  ipv6interface: `${IPV6}/128`,
  ipvanyinterface: `${IPV4}/(?:3[0-2]|[12]?[0-9])`,
  hostname: HOST,
  "idn-hostname": HOST,
  email: EMAIL,
  "idn-email": EMAIL,
  "name-email": EMAIL,
  uri: URI,
  iri: URI,
  url: URI,
  "uri-reference": REFERENCE,
  "iri-reference": REFERENCE,
  "uri-template": `${URI}(?:/\\{[a-z][a-z0-9_]{0,20}\\})*`,
  "json-pointer": POINTER,
  "relative-json-pointer": `(?:0|[1-9][0-9]{0,3})(?:#|${POINTER})`,
  regex: "\\^?(?:(?:[A-Za-z0-9_ @#/:,-]|\\\\[dwsDWS.]|\\.|\\[[A-Za-z0-9]{1,20}\\])[*+?]?){0,40}\\$?",
  "json-string": '(?:-?(?:0|[1-9][0-9]{0,8})|true|false|null|"[A-Za-z0-9 _-]{0,60}"|\\{\\}|\\[\\])',
  byte: BASE64,
  base64: BASE64,
  base64url: "[A-Za-z0-9_-]*",
  /** Its header says HS256. */
  jwt: "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9\\.[A-Za-z0-9_-]{1,400}\\.[A-Za-z0-9_-]{43}",
  color: "#[0-9a-f]{6}",
  password: "",
  binary: "",
  path: "[A-Za-z0-9._/-]{1,200}",
  "file-path": "[A-Za-z0-9._/-]{1,200}",
  "directory-path": "[A-Za-z0-9._/-]{1,200}",
};
