// The services as the coordinator's protos describe them, without generated code: for a client in the test, and for made-up answers.

import { execFileSync } from "node:child_process";
import { readFileSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

const WEB = resolve(import.meta.dirname, "..");

function read() {
  const folder = mkdtempSync(join(tmpdir(), "shanty-protos-"));
  const file = join(folder, "protos.binpb");
  execFileSync(join(WEB, "node_modules/.bin/buf"), ["build", resolve(WEB, "../proto"), "-o", file]);
  const set = fromBinary(FileDescriptorSetSchema, readFileSync(file));
  rmSync(folder, { recursive: true });
  return createFileRegistry(set);
}

export const registry = read();

export const message = (name) => registry.getMessage(`shanty.v1.${name}`);

/** A client over gRPC-web, as the page is one. */
export function client(service, baseUrl, token) {
  const authorize = (next) => (request) => {
    if (token) request.header.set("authorization", `Bearer ${token}`);
    return next(request);
  };
  return createClient(registry.getService(`shanty.v1.${service}`), createGrpcWebTransport({ baseUrl, interceptors: [authorize] }));
}
